"""HunyuanImage-2.1: options and how files are recognised; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sfumato.config.rules import Amount, Idle, Weights
from sfumato.families.hunyuan_image.clients import LOADS_IN
from sfumato.families.hunyuan_image.network_args import NetworkArgs
from sfumato.models import flow_options
from sfumato.models.detection import (
    DOWN,
    PREFIX,
    Detected,
    Shapes,
    Signature,
    has,
    hunyuan_vae,
    language_model,
    marked,
    parts,
    t5,
    width,
    words,
)
from sfumato.models.facts import Facts
from sfumato.models.flow_options import FlowOptions, Shift

FAMILY = "hunyuan_image"
SHIFT = 5.0
"""Towards noise, of training and of samplers (github.com/Tencent-Hunyuan/HunyuanImage-2.1); for the distilled model's
samples 4 is recommended."""
SCALE = 3.5
"""Of classifier-free guidance, where a prompt does not set it."""
APG_START, APG_START_OCR = 5, 38
"""The last step of plain guidance, counted from 0, without and with text in quotes."""
SAMPLE_GUIDANCE = 3.25
"""For the distilled model, where a prompt does not set it."""
GUIDANCE = 1.0
"""For the distilled model, while training."""
WIDTH = 3584
"""Channels of the transformer, and of Qwen2.5-VL-7B."""
GLYPHS_WIDTH = 1472
"""Of byT5-small."""
Variant = Literal["base", "distilled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(FlowOptions):
    """Settings of HunyuanImage-2.1 alone."""

    family = FAMILY
    discrete_flow_shift: Shift = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default 5."""
    text_encoder: Weights = None
    """Qwen2.5-VL-7B, where the base model's file does not hold it: file, folder or hub id."""
    byt5: Weights = None
    """byT5-small, which reads what is to be written in images, where the base model's file does not hold it: file,
    folder or hub id."""
    guidance_scale: Amount | None = None
    """The guidance that the distilled model is given while training; default 1. The base model takes none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Options):
    """The options, with what the file says. guidance_scale is the distilled model's."""

    variant: Variant
    double_blocks: int
    single_blocks: int


# --- files ---

QWEN, BYT5, VAE = "text_encoders.qwen25_7b.transformer.", "text_encoders.byt5_small.transformer.", "vae."
"""What stands before names in files that hold several nets, as ComfyUI writes them."""
COMFY_PREFIX = "model.model."
"""What ComfyUI puts before the names of this transformer in such a file."""
PREFIXES = ("", PREFIX, COMFY_PREFIX)
PATCHES = {"native": "img_in.proj.weight", "diffusers": "x_embedder.proj.weight"}
ATTENTION = {
    "native": "double_blocks.0.img_attn_qkv.weight",
    "comfy": "double_blocks.0.img_attn.qkv.weight",
    "diffusers": "transformer_blocks.0.attn.add_q_proj.weight",
}
"""Key format -> a tensor by which it is known."""
_REFINERS = {
    "native": "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "diffusers": "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
}
_MARKS = {
    name: (PATCHES.get(name, PATCHES["native"]), _REFINERS.get(name, _REFINERS["native"]), attention)
    for name, attention in ATTENTION.items()
}
_REFINER = "the refiner of HunyuanImage-2.1, which goes over finished images and is not supported yet"


def _denoiser(shapes: Shapes) -> Detected | None:
    """The model, or its refiner, which takes latents of videos and a noised image beside them. Models for videos are
    made of the same layers."""
    if (found := marked(shapes, _MARKS, PREFIXES)) is None:
        return None
    dialect, prefix = found
    patches = shapes[prefix + _MARKS[dialect][0]]
    refiner = len(patches) == 5 and patches[1:] == (128, 1, 1, 1)
    if not refiner and (len(patches) != 4 or not has(shapes, r"(.*\.)?(byt5_in|context_embedder_2)\..*")):
        return None
    return Detected(
        family=FAMILY,
        kind="checkpoint",
        dialect=dialect,
        variant="refiner" if refiner else variant(shapes),
        parts=parts(shapes, vae=VAE),
        refused=_REFINER if refiner else "",
    )


def variant(shapes: Shapes) -> Variant:
    """ "distilled" where a layer takes the guidance."""
    return "distilled" if has(shapes, r"(.*\.)?(guidance_in|guidance_embedder)\..*") else "base"


_INPUTS = (
    r".*(qkv|linear1|attn_proj|attn\.proj|to_[qkv]|add_[qkv]_proj|proj_mlp|[._]lin|_linear|mod\.linear|mlp[._](fc1|0))"
    + DOWN
)
"""Factors of a LoRA that are as wide as the transformer."""


def _own(shapes: Shapes) -> bool:
    """Models for videos have all of these names, of other widths; of kinds that do not show theirs the names decide."""
    found = width(shapes, _INPUTS)
    names = r".*((img|txt)_mlp[._]fc[12]|(img|txt)_mod_linear|modulation_linear|byt5_in).*"
    return has(shapes, names) if found is None else found == WIDTH


SIGNATURE = Signature(
    family=FAMILY,
    claims={"hunyuan-image-2.1": "", "hunyuan_image": ""},
    denoiser=_denoiser,
    adapters={
        r"(lora_unet|lycoris|oft_unet)_(double|single)_blocks_.*": "kohya",
        r"(diffusion_model\.)?(double|single)_blocks\..*": "comfy",
        r"(transformer\.)?(single_)?transformer_blocks\..*": "peft",
    },
    foreign=r".*(joint_blocks|distilled_guidance_layer|vector_in|(img|txt)_mod\.1).*|lora_te[23]?_.*",
    # FLUX.1's and HunyuanVideo's, which have ComfyUI's and diffusers' names.
    fits=lambda shapes: width(shapes, _INPUTS) != 3072,
    own=_own,
    singles=(*hunyuan_vae(VAE), *language_model("qwen25vl", WIDTH), *t5(GLYPHS_WIDTH), words("qwen25_7b")),
)

_FROZEN = "Qwen2.5-VL and byT5 are never trained"
FACTS = Facts(
    options=Options,
    signature=SIGNATURE,
    architecture=lambda options: "hunyuan-image-2.1",
    base_model_version=lambda options: "hunyuan-image-2.1",
    swaps_pairs=True,
    pipelines=("HunyuanImagePipeline",),
    scripts={"hunyuan_image_train_network": "network", "hunyuan_image_train": "full"},
    # Of the names that others read, the only ones by which ComfyUI loads all layers.
    defaults={"sample_sampler": "euler", "dialect": "comfy"},
    prompt={
        "width": 2048,
        "height": 2048,
        "sample_steps": 50,
        "scale": SCALE,
        "guidance_scale": SAMPLE_GUIDANCE,
        "flow_shift": SHIFT,
        "apg_start_step_general": APG_START,
        "apg_start_step_ocr": APG_START_OCR,
        "guidance_rescale": 0.0,
        "guidance_rescale_apg": 0.0,
    },
    refused={
        **flow_options.REFUSED,
        **dict.fromkeys(("train_text_encoder", "network_train_text_encoder_only"), _FROZEN),
    },
    idle=(*flow_options.IDLE, Idle(("text_encoder_lr",), lambda s: True, _FROZEN)),
    network_args=NetworkArgs,
    metadata=(*flow_options.METADATA, "guidance_scale"),
    loads_in=LOADS_IN,
)
