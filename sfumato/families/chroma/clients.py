"""Who loads adapters of Chroma, and by which names; imports no torch."""

from __future__ import annotations

from dataclasses import replace

from sfumato.families.flux.clients import NATIVE
from sfumato.formats.clients import Names
from sfumato.models.shared_names import elsewhere, t5_names

_KOHYA, _COMFY = t5_names("1")
LOADS_IN = (
    *NATIVE,
    Names(dialect="peft", component="denoiser", names=r"transformer\..*", known_to=("ComfyUI", "diffusers")),
    elsewhere("SimpleTuner's", "lycoris_", "ComfyUI"),
    elsewhere("OneTrainer's", "lora_transformer_", "ComfyUI"),
    # diffusers takes the first text encoder for a CLIP.
    replace(_KOHYA, refused_by=("diffusers",)),
    elsewhere("sd-scripts'", "lora_te3_", "Forge", component="t5xxl"),
    _COMFY,
)
