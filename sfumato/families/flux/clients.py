"""Who loads adapters of FLUX.1, and by which names; imports no torch."""

from __future__ import annotations

from sfumato.formats.clients import Names
from sfumato.models.shared_names import clip_names, elsewhere, t5_names

_ALL = ("ComfyUI", "Forge", "diffusers")
NATIVE = (
    Names(dialect="kohya", component="denoiser", names=r"lora_unet_.*", known_to=_ALL),
    Names(dialect="comfy", component="denoiser", names=r"diffusion_model\..*", known_to=("ComfyUI", "Forge")),
)
"""Of the transformer in its own names."""
LOADS_IN = (
    *NATIVE,
    Names(dialect="peft", component="denoiser", names=r"transformer\..*", known_to=_ALL),
    elsewhere("SimpleTuner's", "lycoris_", "ComfyUI", "Forge"),
    elsewhere("OneTrainer's", "lora_transformer_", "ComfyUI", "Forge"),
    *clip_names("clip_l", "1", "text_encoder", _ALL),
    *t5_names("3"),
)
