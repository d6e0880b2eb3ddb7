"""VAEs: how latents are scaled; diffusers' KL autoencoder, sized by the tensors of a file, and how files name it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats.names import CONV_TO_LINEAR, KeyMap, Rule, rule
from sfumato.models.components import Component, Config, Scaling, matching
from sfumato.models.key_formats import NATIVE, KeyFormat
from sfumato.models.layers import Shapes, count_layers
from sfumato.tensors.meta import without_values

FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
"""From raw latents to those of the denoiser, (x - shift) * scale, in FLUX.1 and the models that have its VAE."""
SD_SCALE = 0.18215
"""Factor from raw latents to those of the denoiser in Stable Diffusion 1.x and 2.x."""
LDM_MARK, DIFFUSERS_MARK = "encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"
"""A tensor by which a KL autoencoder's key format is known."""
UNUSED = matching(r"(?!(encoder|decoder|quant_conv|post_quant_conv)\.).*")
"""A VAE's own checkpoint also holds the loss that it was trained with, and an average of the weights."""
EARLY_MARK = "encoder.mid_block.attentions.0.query.weight"


def kl_net(shapes: Shapes, scale: float, shift: float | None = None) -> Any:
    """diffusers' AutoencoderKL without values (on the meta device) for tensors of these shapes, in diffusers' names.

    `scale`, `shift`: from raw latents to those of the denoiser; they stand in its config. Errors: `KeyError` for a
    missing tensor.
    """
    from diffusers import AutoencoderKL

    levels = count_layers(shapes, r"encoder\.down_blocks\.(\d+)\.")
    with without_values():
        return AutoencoderKL(
            in_channels=shapes["encoder.conv_in.weight"][1],
            out_channels=shapes["decoder.conv_out.weight"][0],
            latent_channels=shapes["decoder.conv_in.weight"][1],
            block_out_channels=tuple(
                shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)
            ),
            layers_per_block=count_layers(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            use_quant_conv="quant_conv.weight" in shapes,
            use_post_quant_conv="post_quant_conv.weight" in shapes,
            scaling_factor=scale,
            shift_factor=shift,
            sample_size=256,
        )


def unscale(vae: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `scaled`."""
    factor, shift = on(latents.device, scaling_of(vae))
    return latents / factor + shift


def scaled(latents: Tensor, scaling: Scaling) -> Tensor:
    """Raw latents -> those of the denoiser: (x - shift) * factor."""
    factor, shift = scaling
    return (latents - shift) * factor


def scaling_of(vae: nn.Module) -> Scaling:
    """What a VAE's config says."""
    config = cast(Any, vae).config
    if "scaling_factor" in config:
        return float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
    return per_channel(config.latents_mean, config.latents_std)


def per_channel(mean: Sequence[float], std: Sequence[float]) -> Scaling:
    """Factor and shift (c, 1, 1), fp32, that give every channel mean 0 and spread 1."""
    return 1.0 / torch.tensor(std)[:, None, None], torch.tensor(mean)[:, None, None]


def on(device: torch.device, scaling: Scaling) -> Scaling:
    """The same on a device."""
    factor, shift = (x.to(device) if isinstance(x, Tensor) else x for x in scaling)
    return factor, shift


# --- files ---


def vae_component(
    prefixes: tuple[str, ...],
    scale: float = SD_SCALE,
    shift: float | None = None,
    *,
    channels: int = 4,
    bundled: bool = True,
) -> Component:
    """A KL autoencoder. `scale`, `shift`: what is used without a config. `channels`: of its latents."""

    def scaling(config: Config) -> tuple[float, float]:
        return float(config.get("scaling_factor", scale)), float(config.get("shift_factor", shift) or 0.0)

    def net(shapes: Shapes, config: Config) -> nn.Module:
        if (found := shapes["decoder.conv_in.weight"][1]) != channels:
            raise UserError(
                f"vae: its latents have {found} channels, those of this model {channels}: it is another model's VAE"
            )
        made: nn.Module = kl_net(shapes, float(config.get("scaling_factor", scale)), config.get("shift_factor", shift))
        return made

    return Component(
        name="vae",
        title="the VAE",
        prefixes=(*prefixes, ""),
        folder="vae",
        flag="vae",
        net=net,
        key_format=vae_key_format,
        single=lambda names: KeyFormat("ldm", vae_keys(names)),
        bundled=bundled,
        unused_keys=UNUSED,
        scaling=scaling,
    )


def vae_key_format(names: Collection[str]) -> KeyFormat | None:
    """How a file names a KL autoencoder: as LDM does, as diffusers does, or as diffusers did in 2022."""
    if LDM_MARK in names:
        return KeyFormat("ldm", vae_keys(names))
    if DIFFUSERS_MARK not in names:
        return None
    return KeyFormat("diffusers 2022", EARLY) if EARLY_MARK in names else NATIVE


def vae_keys(names: Collection[str]) -> KeyMap:
    """native: diffusers' AutoencoderKL. foreign: LDM. For a net with tensors of these names, of either side."""
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


EARLY = _early()
