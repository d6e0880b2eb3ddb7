"""Who loads adapters of HunyuanImage-2.1, and by which names; imports no torch."""

from __future__ import annotations

from sfumato.formats.clients import Names, Part
from sfumato.models.shared_names import elsewhere

# ComfyUI takes kohya's prefix before its own names, which are Tencent's for these layers.
_ALIKE = Part(
    names=r"lora_unet_((double_blocks_\d+_(img|txt)_attn|txt_in_individual_token_refiner_blocks_\d+_self_attn)_(qkv|proj)"
    r"|single_blocks_\d+_linear[12]|(img_in|txt_in_input|byt5_in|final_layer)_.*"
    r"|txt_in_individual_token_refiner_blocks_\d+_(norm[12]|adaLN_modulation_1))",
    lacks="two-layer nets and the modulation",
)
LOADS_IN = (
    Names(dialect="kohya", component="denoiser", names=r"lora_unet_.*", partly={"ComfyUI": _ALIKE}),
    Names(dialect="comfy", component="denoiser", names=r"diffusion_model\..*", known_to=("ComfyUI",)),
    # By the transformer's own loader: the pipeline has none.
    Names(dialect="peft", component="denoiser", names=r"transformer\..*", known_to=("diffusers",)),
    elsewhere("SimpleTuner's", "lycoris_"),
    elsewhere("OneTrainer's", "lora_transformer_"),
)
