"""What a checkpoint of Stable Diffusion 1.x or 2.x holds, however it was laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sfumato.families import sources
from sfumato.families.autoencoders import SD_SCALE, vae_names
from sfumato.formats import files

TextNames = Literal["hf", "bare", "open_clip"]
"""How a single file spells the text encoder: transformers' names, the same without `text_model.`, or OpenCLIP's."""
VAE_PREFIX = "first_stage_model."


@dataclass(frozen=True, kw_only=True)
class Source:
    """Tensors in native names as they stand in the file; mapped, not read, until they are used."""

    path: Path
    unet: dict[str, Tensor]
    text: dict[str, Tensor]
    vae: dict[str, Tensor] | None
    """In the names of diffusers' AutoencoderKL; None: the file has no VAE."""
    vae_scale: float = SD_SCALE
    activation: str
    """Of the text encoder: "quick_gelu" or "gelu"."""
    text_names: TextNames
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of no net, under their full names in the single file; copied when one is saved."""
    prediction: Literal["eps", "v"] | None = None
    """What the U-Net says; None: the source does not tell."""

    @property
    def v2(self) -> bool:
        """Whether this is 2.x, which projects into its transformers by linear layers."""
        return self.unet["middle_block.1.proj_in.weight"].ndim == 2

    @property
    def encoder(self) -> str:
        """Component name of the text encoder."""
        return "clip_h" if self.v2 else "clip_l"


def read_vae(name: str, flag: str = "vae") -> tuple[dict[str, Tensor], float]:
    """A VAE's tensors in the names of diffusers' AutoencoderKL, and its scale.

    `name`: a file (its names with or without the prefix of single files, or a whole single file), the folder of
    a VAE or of a pipeline, or a hub id. Errors: `UserError` when there is no KL autoencoder in it.
    """
    path = sources.local(name, flag)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config = sources.read_json(folder / "config.json")
        return vae_names(sources.weights(folder), str(folder)), float(config.get("scaling_factor", SD_SCALE))
    tensors = files.load(path)
    if any(name.startswith(VAE_PREFIX) for name in tensors):
        tensors = {name.removeprefix(VAE_PREFIX): t for name, t in tensors.items() if name.startswith(VAE_PREFIX)}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    # A VAE's own checkpoint also holds the loss it was trained with and an average of the weights.
    return vae_names({name: t for name, t in tensors.items() if name.startswith(parts)}, str(path)), SD_SCALE


def unchanged(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Whether a net's tensors are those of the file, but for their number format."""
    return own.keys() == given.keys() and all(torch.equal(t.cpu(), given[name].to(t.dtype)) for name, t in own.items())
