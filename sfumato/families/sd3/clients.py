"""Who loads adapters of Stable Diffusion 3 and 3.5, and by which names; imports no torch."""

from __future__ import annotations

from sfumato.formats.clients import Names, Part
from sfumato.models.shared_names import clip_names, elsewhere, t5_names

_COMFY = ("ComfyUI", "Forge")
# A1111 runs 3 medium alone. It asks each key for two dots, which `alpha` of a kohya name has not.
_ATTENTION = Part(
    names=r"transformer\.transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)",
    lacks="text side, the feed-forward layers and the whole of 3.5",
)
LOADS_IN = (
    Names(dialect="kohya", component="denoiser", names=r"lora_unet_.*", known_to=_COMFY, refused_by=("A1111",)),
    Names(dialect="comfy", component="denoiser", names=r"diffusion_model\..*", known_to=_COMFY),
    Names(
        dialect="peft",
        component="denoiser",
        names=r"transformer\..*",
        known_to=("ComfyUI", "diffusers"),
        partly={"A1111": _ATTENTION},
    ),
    elsewhere("SimpleTuner's", "lycoris_", "ComfyUI"),
    elsewhere("OneTrainer's", "lora_transformer_", "ComfyUI"),
    elsewhere("PEFT's own", r"base_model\.model\.", "ComfyUI"),
    *clip_names("clip_l", "1", "text_encoder", _COMFY),
    *clip_names("clip_g", "2", "text_encoder_2", _COMFY),
    *t5_names("3"),
)
