"""The causal video VAE of 16 channels (Wan 2.1's, and Qwen-Image's, which is tuned from it): diffusers' class, sized by
the tensors of a file, and how files name it.

Pictures are videos of one frame: (b, c, 1, h, w). Wan Team 2025, arXiv:2503.20314.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import UserError
from sfumato.formats.names import KeyMap, Rule, rule
from sfumato.models.autoencoders import per_channel
from sfumato.models.components import Component, Config, Scaling
from sfumato.models.key_formats import NATIVE, KeyFormat
from sfumato.models.layers import Shapes, count_layers
from sfumato.tensors.meta import without_values

CHANNELS = 16
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
"""Of raw latents, by channel."""
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
"""Their spread."""


def qwen_vae_component(prefixes: tuple[str, ...], *, bundled: bool = False) -> Component:
    """The video VAE of 16 channels. `prefixes`: in files that hold more, which it may lack; `bundled`: whether a new
    single file holds it."""
    return Component(
        name="vae",
        title="the video VAE of 16 channels",
        prefixes=(*prefixes, ""),
        folder="vae",
        flag="vae",
        net=_net,
        key_format=_key_format,
        single=_original,
        bundled=bundled,
        scaling=_scaling,
    )


def _scaling(config: Config) -> Scaling:
    return per_channel(config.get("latents_mean", MEAN), config.get("latents_std", STD))


def _net(shapes: Shapes, config: Config) -> nn.Module:
    """diffusers' AutoencoderKLQwenImage without values, for tensors in diffusers' names."""
    from diffusers import AutoencoderKLQwenImage

    if (channels := shapes["decoder.conv_in.weight"][1]) != CHANNELS:
        raise UserError(
            f"vae: its latents have {channels} channels, those of this model {CHANNELS}: it is another model's VAE"
        )
    base, levels, blocks = shapes["encoder.conv_in.weight"][0], *_sizes(shapes)
    firsts = [level * (blocks + 1) for level in range(levels)]
    with without_values():
        made: Any = AutoencoderKLQwenImage(
            base_dim=base,
            z_dim=channels,
            dim_mult=[shapes[f"encoder.down_blocks.{i}.conv1.weight"][0] // base for i in firsts],
            num_res_blocks=blocks,
            temperal_downsample=[f"encoder.down_blocks.{i + blocks}.time_conv.weight" in shapes for i in firsts[:-1]],
            input_channels=shapes["encoder.conv_in.weight"][1],
            latents_mean=list(config.get("latents_mean", MEAN)),
            latents_std=list(config.get("latents_std", STD)),
        )
    _for_one_frame(made)
    net: nn.Module = made
    return net


def _for_one_frame(vae: Any) -> None:
    """Have it do for a picture what it does for the first frame of a video, in half the time and a third of the memory:
    the layers' inputs are not kept for a second frame, and the frames of zeros before the first are left out."""
    vae._feat_map = vae._enc_feat_map = None
    vae.clear_cache = _nothing
    for conv in vae.modules():
        if isinstance(conv, nn.Conv3d):
            conv.forward = partial(_last_slice, conv)  # type: ignore[method-assign]


def _nothing() -> None:
    """In place of diffusers' making of empty caches."""


def _last_slice(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A causal convolution of x (b, c, 1, h, w): the rest of the kernel meets only zeros."""
    flat = functional.conv2d(x.squeeze(2), conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[-1] // 2)
    return flat[:, :, None]


def _key_format(shapes: Shapes) -> KeyFormat | None:
    if "encoder.downsamples.0.residual.2.weight" in shapes:
        return _original(shapes)
    flat = "encoder.down_blocks.0.conv1.weight"
    return NATIVE if len(shapes.get(flat, ())) == 5 else None


def _original(names: Collection[str]) -> KeyFormat:
    return KeyFormat("original", qwen_vae_keys(names))


def qwen_vae_keys(names: Collection[str]) -> KeyMap:
    """native: diffusers' AutoencoderKLQwenImage. foreign: Wan's own names, which ComfyUI's files have. For a net with
    tensors of these names, of either side."""
    levels, blocks = _sizes(names)
    rules = [rule("quant_conv", "conv1"), rule("post_quant_conv", "conv2")]
    for half in ("encoder", "decoder"):
        rules += [rule(f"{half}.conv_in", f"{half}.conv1")]
        rules += [rule(f"{half}.norm_out", f"{half}.head.0"), rule(f"{half}.conv_out", f"{half}.head.2")]
        rules += [rule(f"{half}.mid_block.attentions.0", f"{half}.middle.1")]
        rules += _residual(f"{half}.mid_block.resnets.0", f"{half}.middle.0")
        rules += _residual(f"{half}.mid_block.resnets.1", f"{half}.middle.2")
    down = "encoder.down_blocks.{i}", "encoder.downsamples.{i}"
    rules += [*_residual(*down), *_resample(*down)]
    for level in range(levels):
        native, first = f"decoder.up_blocks.{level}", level * (blocks + 2)
        for i in range(blocks + 1):
            rules += _residual(f"{native}.resnets.{i}", f"decoder.upsamples.{first + i}")
        rules += _resample(f"{native}.upsamplers.0", f"decoder.upsamples.{first + blocks + 1}")
    return KeyMap(*rules)


def _residual(native: str, foreign: str) -> list[Rule]:
    """A residual block; the original is a sequence with activations and dropout at the other numbers."""
    parts = {"norm1": 0, "conv1": 2, "norm2": 3, "conv2": 6}
    return [
        *(rule(f"{native}.{n}", f"{foreign}.residual.{i}") for n, i in parts.items()),
        rule(f"{native}.conv_shortcut", f"{foreign}.shortcut"),
    ]


def _resample(native: str, foreign: str) -> list[Rule]:
    return [rule(f"{native}.{part}", f"{foreign}.{part}") for part in ("resample", "time_conv")]


def _sizes(names: Collection[str]) -> tuple[int, int]:
    """(levels, layers of a level in the encoder), from names of either side. Errors: `KeyError` where there is none."""
    halvings = count_layers(names, r"encoder\.down(?:_blocks|samples)\.(\d+)\.resample\.1\.weight")
    blocks = count_layers(names, r"encoder\.down(?:_blocks|samples)\.(\d+)\.(?:conv1|residual\.2)\.weight")
    if not halvings:
        raise KeyError("encoder.downsamples.*.resample.1.weight")
    return halvings + 1, blocks // (halvings + 1)
