"""Who loads adapters of Lumina Image 2.0, and by which names; imports no torch."""

from __future__ import annotations

from sfumato.formats.clients import Names

LOADS_IN = (
    # diffusers has a way for ComfyUI's names, which stops at the last layer and at each alpha.
    Names(dialect="kohya", component="denoiser", names=r"lora_unet_.*", known_to=("ComfyUI",)),
    Names(
        dialect="comfy",
        component="denoiser",
        names=r"diffusion_model\..*",
        known_to=("ComfyUI",),
        refused_by=("diffusers",),
    ),
    Names(dialect="peft", component="denoiser", names=r"transformer\..*", known_to=("diffusers",)),
    Names(dialect="kohya", component="gemma2", names=r"lora_te_.*"),
    Names(dialect="comfy", component="gemma2", names=r"text_encoders\.gemma2_2b\..*", known_to=("ComfyUI",)),
)
