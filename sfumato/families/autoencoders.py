"""VAEs: diffusers' classes filled from files in any spelling."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.encoders import count_layers
from sfumato.families.fill import fill
from sfumato.formats.names import CONV_TO_LINEAR, KeyMap, Rule, rule

SD_SCALE = 0.18215
"""Factor from raw latents to those of the denoiser in Stable Diffusion 1.x and 2.x."""
LDM_MARK, DIFFUSERS_MARK = "encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"
"""A tensor by which the spelling of a KL autoencoder is known."""


def load_kl(tensors: Mapping[str, Tensor], scale: float = SD_SCALE, what: str = "the VAE") -> Any:
    """diffusers' AutoencoderKL with these tensors, in LDM's or in diffusers' names without prefix.

    Sizes are read off the shapes. Errors: `UserError` for missing, further or mis-shaped tensors.
    """
    from diffusers import AutoencoderKL

    native = vae_names(tensors, what)
    try:
        levels = count_layers(native, r"encoder\.down_blocks\.(\d+)\.")
        channels = tuple(native[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
        sizes = {
            "in_channels": native["encoder.conv_in.weight"].shape[1],
            "out_channels": native["decoder.conv_out.weight"].shape[0],
            "latent_channels": native["decoder.conv_in.weight"].shape[1],
            "layers_per_block": count_layers(native, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        }
    except KeyError as missing:
        raise UserError(f"{what} lacks the tensor {missing}: the file is incomplete or of another kind") from None
    with torch.device("meta"):
        net = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            use_quant_conv="quant_conv.weight" in native,
            use_post_quant_conv="post_quant_conv.weight" in native,
            scaling_factor=scale,
            sample_size=256,
            **sizes,
        )
    return fill(net, native, what)


def vae_names(tensors: Mapping[str, Tensor], what: str = "the VAE") -> dict[str, Tensor]:
    """The tensors under the names of diffusers' present classes."""
    if LDM_MARK in tensors:
        return vae_keys(tensors).to_native(tensors)
    if DIFFUSERS_MARK not in tensors:
        raise UserError(f"{what}: neither {LDM_MARK!r} nor {DIFFUSERS_MARK!r} is in it, so it is no KL autoencoder")
    if "encoder.mid_block.attentions.0.query.weight" in tensors:
        return _EARLY.to_native(tensors)
    return dict(tensors)


def vae_keys(names: Collection[str]) -> KeyMap:
    """native: diffusers' AutoencoderKL. foreign: LDM. For a net with tensors of these names, in either spelling."""
    starts = ("encoder.down.", "encoder.down_blocks.")
    levels = len({name.split(".")[2] for name in names if name.startswith(starts)})
    rules = [rule("quant_conv"), rule("post_quant_conv")]
    for half in ("encoder", "decoder"):
        rules += [rule(f"{half}.conv_in"), rule(f"{half}.conv_out"), rule(f"{half}.conv_norm_out", f"{half}.norm_out")]
        rules += [rule(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}") for i in range(2)]
        rules += _attention(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
    for level in range(levels):
        rules += _level(f"encoder.down_blocks.{level}", f"encoder.down.{level}", "down")
        rules += _level(f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}", "up")
    return KeyMap(*rules)


def _level(native: str, foreign: str, way: str) -> list[Rule]:
    return [
        rule(f"{native}.resnets.{{i}}", f"{foreign}.block.{{i}}"),
        rule(f"{native}.resnets.{{i}}.conv_shortcut", f"{foreign}.block.{{i}}.nin_shortcut"),
        rule(f"{native}.{way}samplers.0.conv", f"{foreign}.{way}sample.conv"),
    ]


def _attention(native: str, foreign: str) -> list[Rule]:
    parts = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    return [
        rule(f"{native}.group_norm", f"{foreign}.norm"),
        *(rule(f"{native}.{n}", f"{foreign}.{f}", change=CONV_TO_LINEAR) for n, f in parts.items()),
    ]


def _early() -> KeyMap:
    """native: diffusers now. foreign: diffusers of 2022, whose VAE files are still about."""
    parts = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    mids = [f"{half}.mid_block.attentions.0" for half in ("encoder", "decoder")]
    renamed = [rule(f"{mid}.{n}", f"{mid}.{f}") for mid in mids for n, f in parts.items()]
    same = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    return KeyMap(*renamed, *(rule(name) for name in same))


_EARLY = _early()
