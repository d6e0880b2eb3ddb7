"""Single files of Stable Diffusion 1.x and 2.x, as LDM lays them out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.autoencoders import vae_keys, vae_names
from sfumato.families.encoders import CLIP_BARE, CLIP_HF, OPEN_CLIP
from sfumato.families.sd.names import CLIP_H, CLIP_L, KEPT, UNET, VAE
from sfumato.families.sd.source import Source, TextNames
from sfumato.formats import files
from sfumato.formats.names import add_prefix

LAYERS_USED = 23
"""Layers of OpenCLIP-H that 2.x uses; files hold one more."""
_RESBLOCK = re.compile(re.escape(CLIP_H) + r"transformer\.resblocks\.(\d+)\.")


def read(path: Path) -> Source:
    """A single file. Errors: as `claim`, and for files that cannot be read."""
    return claim(path, files.load(path), files.read_header(path).metadata)


def claim(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Source:
    """Every tensor of a single file at its place: in a net or among those to keep. Errors: `UserError` naming those that have none."""
    unused = _unused_layer(tensors)
    kept = {name: t for name, t in tensors.items() if KEPT.fullmatch(name) or (unused and name.startswith(unused))}
    parts: dict[str, dict[str, Tensor]] = {UNET: {}, VAE: {}, CLIP_L: {}, CLIP_H: {}}
    strange = []
    for name, t in tensors.items():
        prefix = next((p for p in parts if name.startswith(p)), None)
        if name in kept:
            continue
        if prefix is None:
            strange.append(name)
        else:
            parts[prefix][name.removeprefix(prefix)] = t
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise UserError(f"{path}: tensors that belong to no part of Stable Diffusion 1.x or 2.x: {', '.join(strange[:5])}{more}")
    text_names, text = _read_text(parts)
    return Source(
        path=path,
        unet=parts[UNET],
        text=text,
        vae=vae_names(parts[VAE], str(path)) if parts[VAE] else None,
        activation="gelu" if text_names == "open_clip" else "quick_gelu",
        text_names=text_names,
        kept=kept,
        prediction=_prediction(tensors, metadata),
    )


def _unused_layer(tensors: Mapping[str, Tensor]) -> str | None:
    """Prefix of OpenCLIP's last layer, whose states 2.x does not use; None: no such layer here."""
    numbers = {int(m[1]) for name in tensors if (m := _RESBLOCK.match(name))}
    return f"{CLIP_H}transformer.resblocks.{max(numbers)}." if numbers and len(numbers) != LAYERS_USED else None


def _read_text(parts: Mapping[str, Mapping[str, Tensor]]) -> tuple[TextNames, dict[str, Tensor]]:
    if parts[CLIP_H]:
        return "open_clip", OPEN_CLIP.to_foreign(parts[CLIP_H])
    if any(name.startswith("text_model.") for name in parts[CLIP_L]):
        return "hf", CLIP_HF.to_native(parts[CLIP_L])
    return "bare", CLIP_BARE.to_native(parts[CLIP_L])


def _prediction(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Literal["eps", "v"] | None:
    said = metadata.get("modelspec.prediction_type", "")
    if "v_pred" in tensors or said == "v" or metadata.get("modelspec.architecture", "").endswith("-768-v"):
        return "v"
    return "eps" if said == "epsilon" else None


def spell(source: Source, unet: Mapping[str, Tensor], text: Mapping[str, Tensor], vae: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of a single file, spelled as the source was; what belongs to no net is the source's."""
    if source.text_names == "open_clip":
        spelled = add_prefix(OPEN_CLIP.to_native(text), CLIP_H)
        if not source.kept and source.path.is_dir():
            spelled |= _idle_layer(spelled)
    else:
        spelled = add_prefix((CLIP_HF if source.text_names == "hf" else CLIP_BARE).to_foreign(text), CLIP_L)
    image = add_prefix(vae_keys(vae).to_foreign(vae), VAE) if vae else {}
    return {**add_prefix(unet, UNET), **spelled, **image, **source.kept}


def _idle_layer(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A last layer of zeros, which passes its input on: readers expect one more layer than is used, and folders hold none."""
    last = max(int(m[1]) for name in text if (m := _RESBLOCK.match(name)))
    prefix, added = f"{CLIP_H}transformer.resblocks.{last}.", f"{CLIP_H}transformer.resblocks.{last + 1}."
    return {added + name.removeprefix(prefix): torch.zeros_like(t) for name, t in text.items() if name.startswith(prefix)}
