"""Who loads adapters of Chroma, and by which names; imports no torch."""

from __future__ import annotations

from dataclasses import replace

from sfumato.families.flux.clients import NATIVE
from sfumato.formats.clients import Names
from sfumato.models.shared_names import t5_names

_KOHYA, _COMFY = t5_names("1")
LOADS_IN = (
    *NATIVE,
    Names(dialect="peft", component="denoiser", names=r"transformer\..*", known_to=("ComfyUI", "diffusers")),
    # diffusers takes the first text encoder for a CLIP.
    replace(_KOHYA, refused_by=("diffusers",)),
    # sd-scripts' number.
    Names(dialect="kohya", component="t5xxl", names=r"lora_te3_.*", known_to=("Forge",)),
    _COMFY,
)
