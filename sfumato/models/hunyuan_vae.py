"""The VAE of 32 pixels a side and 64 channels: diffusers' class, sized by the tensors of a file, and how files name it.

Its levels are halved and doubled by moving pixels into channels and back (deep compression, Chen et al. 2024,
arXiv:2410.10733). diffusers numbers the layers of all levels in one list, the original and ComfyUI by level.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from sfumato.errors import UserError
from sfumato.formats.names import KeyMap, Rule, rule
from sfumato.models.autoencoders import UNUSED
from sfumato.models.components import Component, Config
from sfumato.models.key_formats import NATIVE, KeyFormat
from sfumato.models.layers import Shapes, count_layers
from sfumato.tensors.meta import without_values

SCALE = 0.75289
"""Factor from raw latents to those of the denoiser; there is no shift."""
CHANNELS = 64
SAMPLE_SIZE = 384
"""Of diffusers' config: the side of the pictures that it was trained on."""


def hunyuan_vae_component(prefixes: tuple[str, ...], *, bundled: bool = False) -> Component:
    """The VAE of 64 channels. `prefixes`: in files that hold more, which it may lack; `bundled`: whether a new single
    file holds it."""
    return Component(
        name="vae",
        title="the VAE of 64 channels",
        prefixes=(*prefixes, ""),
        folder="vae",
        flag="vae",
        net=_net,
        key_format=_key_format,
        single=_original,
        bundled=bundled,
        unused_keys=UNUSED,
        scaling=lambda config: (_factor(config), 0.0),
    )


def _factor(config: Config) -> float:
    return float(config.get("scaling_factor") or SCALE)


def _net(shapes: Shapes, config: Config) -> nn.Module:
    """diffusers' AutoencoderKLHunyuanImage without values, for tensors in diffusers' names."""
    from diffusers import AutoencoderKLHunyuanImage

    if (channels := shapes["decoder.conv_in.weight"][1]) != CHANNELS:
        raise UserError(
            f"vae: its latents have {channels} channels, those of this model {CHANNELS}: it is another model's VAE"
        )
    levels, blocks = _sizes(shapes)
    firsts = [f"encoder.down_blocks.{level * (blocks + 1)}.conv1.weight" for level in range(levels)]
    with without_values():
        made: Any = AutoencoderKLHunyuanImage(
            in_channels=shapes["encoder.conv_in.weight"][1],
            out_channels=shapes["decoder.conv_out.weight"][0],
            latent_channels=channels,
            block_out_channels=tuple(shapes[name][0] for name in firsts),
            layers_per_block=blocks,
            spatial_compression_ratio=2 ** (levels - 1),
            sample_size=SAMPLE_SIZE,
            scaling_factor=_factor(config),
        )
    net: nn.Module = made
    return net


def _key_format(shapes: Shapes) -> KeyFormat | None:
    if len(shapes.get("decoder.conv_in.weight", ())) != 4:
        return None
    if "encoder.down.0.downsample.conv.weight" in shapes and "quant_conv.weight" not in shapes:
        return _original(shapes)
    return NATIVE if "encoder.down_blocks.0.conv1.weight" in shapes else None


def _original(names: Collection[str]) -> KeyFormat:
    return KeyFormat("original", hunyuan_vae_keys(names))


def hunyuan_vae_keys(names: Collection[str]) -> KeyMap:
    """native: diffusers' AutoencoderKLHunyuanImage. foreign: the original file, and ComfyUI's. For a net with tensors
    of these names, of either side."""
    levels, blocks = _sizes(names)
    rules: list[Rule] = []
    for half in ("encoder", "decoder"):
        rules += [rule(f"{half}.{name}") for name in ("conv_in", "conv_out", "norm_out")]
        rules += [rule(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}") for i in range(2)]
        parts = {"norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "proj": "proj_out"}
        attention = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        rules += [rule(f"{attention[0]}.{n}", f"{attention[1]}.{f}") for n, f in parts.items()]
    for level in range(levels):
        rules += _level("encoder.down", "down", level, blocks)
        rules += _level("decoder.up", "up", level, blocks + 1)
    return KeyMap(*rules)


def _level(half: str, way: str, level: int, blocks: int) -> list[Rule]:
    """Of `blocks` layers and one that halves or doubles the sides."""
    first = level * (blocks + 1)
    return [
        *(rule(f"{half}_blocks.{first + i}", f"{half}.{level}.block.{i}") for i in range(blocks)),
        rule(f"{half}_blocks.{first + blocks}.conv", f"{half}.{level}.{way}sample.conv"),
    ]


def _sizes(names: Collection[str]) -> tuple[int, int]:
    """(levels, layers of a level in the encoder), from names of either side. Errors: `KeyError` where there is none."""
    if levels := count_layers(names, r"encoder\.down\.(\d+)\."):
        return levels, count_layers(names, r"encoder\.down\.0\.block\.(\d+)\.")
    halvings = count_layers(names, r"encoder\.down_blocks\.(\d+)\.conv\.weight")
    if not halvings:
        raise KeyError("encoder.down_blocks.*.conv.weight")
    return halvings + 1, (count_layers(names, r"encoder\.down_blocks\.(\d+)\.conv1\.weight")) // (halvings + 1)
