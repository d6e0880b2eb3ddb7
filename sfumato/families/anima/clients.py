"""Who loads adapters of Anima, and by which names; imports no torch."""

from __future__ import annotations

from sfumato.formats.clients import Names

LOADS_IN = (
    # diffusers passes over kohya's names, and over ComfyUI's as long as an alpha stands among them.
    Names(dialect="kohya", component="denoiser", names=r"lora_unet_.*", known_to=("ComfyUI",)),
    Names(dialect="comfy", component="denoiser", names=r"diffusion_model\..*", known_to=("ComfyUI",)),
    Names(dialect="peft", component="denoiser", names=r"(transformer|text_conditioner)\..*", known_to=("diffusers",)),
    Names(dialect="kohya", component="qwen3", names=r"lora_te_.*"),
    Names(dialect="comfy", component="qwen3", names=r"text_encoders\.qwen3_06b\..*", known_to=("ComfyUI",)),
)
