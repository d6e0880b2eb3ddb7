"""Who loads adapters of Stable Diffusion 1.x and 2.x, and by which names; imports no torch."""

from __future__ import annotations

from sfumato.formats.clients import Names, Part
from sfumato.models.shared_names import ALL, clip_names, elsewhere

# The attention's layers end in `processor.to_q` there, as diffusers wrote them in 2023.
_NO_ATTENTION = Part(names=r"unet\.(?!.*\.to_(q|k|v|out)(\.|$)).*", lacks="attention")
UNET = (
    Names(dialect="kohya", component="denoiser", names=r"lora_unet_.*", known_to=ALL),
    Names(dialect="comfy", component="denoiser", names=r"diffusion_model\..*", known_to=("ComfyUI", "Forge")),
    Names(
        dialect="peft",
        component="denoiser",
        names=r"unet\..*",
        known_to=("diffusers",),
        partly={"ComfyUI": _NO_ATTENTION, "Forge": _NO_ATTENTION},
    ),
    elsewhere("SimpleTuner's", "lycoris_", "ComfyUI", "Forge"),
    elsewhere("sd-scripts' OFT", "oft_unet_", "A1111"),
)
LOADS_IN = (*UNET, *clip_names("text encoder", "", "text_encoder", ALL, "clip_[lh]"))
