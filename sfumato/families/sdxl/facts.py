"""Stable Diffusion XL: options and how files are recognised; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sfumato.families.sd.facts import CONTEXT_XL, UNET_PREFIX, is_controlnet, text_width
from sfumato.models.facts import LEAF, Detected, Facts, Idle, Kind, Shapes

FAMILY = "sdxl"
BLOCKS = 23
"""Values of block_lr: 0 what time and sizes go through, 1-9 `input_blocks`, 10-12 `middle_block`, 13-21
`output_blocks`, 22 `out`."""
SIZE_WIDTH = 256
"""Numbers that each of the embedded sizes takes in the label, which begins with the pooled text."""
SIZES = 6
"""Sizes that the base model is told: original height and width, crop top and left, target height and width."""
SIZES_REFINER = 5
"""Sizes that the refiner is told: an aesthetic score stands for the target's two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run can be told about Stable Diffusion XL."""

    v_parameterization: bool = False
    """The model predicts v instead of noise; seen from the file where that says so."""
    max_token_length: Literal[75, 150, 225] = 75
    """Tokens of a caption; longer ones are cut. 150 and 225 are encoded in chunks of 75."""
    weighted_captions: bool = False
    """Read `(word:1.3)` and `[word]` in captions as weights."""
    clip_skip: int | None = None
    """No effect: this model was made for the layer before the last of both text encoders, and takes no other."""
    learning_rate_te1: float | None = None
    """Learning rate of the first text encoder (CLIP-L) when a whole model is trained; default: learning_rate_te; 0
    freezes it."""
    learning_rate_te2: float | None = None
    """Learning rate of the second text encoder (OpenCLIP bigG) when a whole model is trained; default:
    learning_rate_te; 0 freezes it."""
    block_lr: tuple[float, ...] = ()
    """Learning rates of the U-Net's blocks when a whole model is trained, 23 numbers: time and size embeddings, 9 input
    blocks, 3 middle blocks, 9 output blocks, the last layer; 0 freezes a block."""


def architecture(options: Options) -> str:
    """The model's name in modelspec metadata, without the ending for adapters."""
    return "stable-diffusion-xl-v1-base"


def base_model_version(options: Options) -> str:
    """The model's name in sd-scripts' metadata, `ss_base_model_version`."""
    return "sdxl_base_v1-0"


def check(options: Options) -> Sequence[str]:
    """What is wrong with values that have the right types."""
    wrong = []
    if options.block_lr and len(options.block_lr) != BLOCKS:
        wrong.append(f"block_lr: expected {BLOCKS} numbers with commas between them, found {len(options.block_lr)}")
    if any(rate < 0 for rate in options.block_lr):
        wrong.append(f"block_lr: expected 0 or more, found {min(options.block_lr):g}")
    for name in ("learning_rate_te1", "learning_rate_te2"):
        if (rate := getattr(options, name)) is not None and rate < 0:
            wrong.append(f"{name}: expected 0 or more, found {rate:g}")
    return wrong


# --- files ---


def detect(shapes: Shapes) -> Detected | None:
    """What a file with these tensors is, if it is of this family. Its VAE has the names and shapes of Stable
    Diffusion's."""
    for look in (_checkpoint, _adapter, _controlnet, _text_encoder, _embedding):
        if found := look(shapes):
            return found
    return None


_UNETS = {
    "ldm": (UNET_PREFIX, "label_emb.0.0.weight"),
    "native": ("", "label_emb.0.0.weight"),
    "diffusers": ("", "add_embedding.linear_1.weight"),
}
"""Spelling -> prefix, first layer of the label."""
_DEEP = re.compile(r".*(down|mid|up|input|middle|output)_blocks?[._].*transformer_blocks[._][1-9]\d*[._].*")
"""A second transformer block in one place, which the U-Nets of Stable Diffusion 1.x and 2.x do not have."""
_ATTENTION = r".*attn2[._]to_k"


def _is_deep(shapes: Shapes) -> bool:
    return any(_DEEP.fullmatch(name) for name in shapes)


def _checkpoint(shapes: Shapes) -> Detected | None:
    for dialect, (prefix, label) in _UNETS.items():
        if prefix + label not in shapes or is_controlnet(shapes) or not _is_deep(shapes):
            continue
        width, context = shapes[prefix + label][1], text_width(shapes, _ATTENTION + r"\.weight") or 0
        # The refiner has one text encoder, whose states and pooled text have the same width.
        if width - SIZES_REFINER * SIZE_WIDTH == context:
            return _said(
                "checkpoint",
                dialect,
                "refiner",
                refused="the refiner of Stable Diffusion XL; what is trained is the base model",
            )
        if 0 < width - SIZES * SIZE_WIDTH < context:
            held = {"text_encoder": "conditioner.embedders.", "vae": "first_stage_model."}
            parts = (
                "denoiser",
                *(part for part, start in held.items() if any(name.startswith(start) for name in shapes)),
            )
            return _said("checkpoint", dialect, prediction="v" if "v_pred" in shapes else None, parts=parts)
    return None


_ADAPTERS = {
    "kohya": r"(lora|oft)_unet_(down|mid|up|input|middle|output)_block.*"
    r"|lycoris_(down|mid|up|input|middle|output)_block.*"
    r"|lora_te2_text_model_encoder_layers_.*",
    "comfy": r"diffusion_model\.(input_blocks|middle_block|output_blocks)\..*|text_encoders\.clip_g\..*",
    "peft": r"(unet\.)?(down_blocks|mid_block|up_blocks)\..*|text_encoder_2\.(text_model\.)?encoder\.layers\..*",
}
_SECOND = re.compile(r"lora_te2_.*|text_encoder_2\..*|text_encoders\.clip_g\..*")
"""The second text encoder, of an adapter for text encoders alone."""
_OTHERS = re.compile(r".*(double|joint|single_transformer)_blocks.*|(transformer|lora_transformer)[._].*|lora_te3_.*")
"""Of transformers, whose adapters have names in common with these."""


def _adapter(shapes: Shapes) -> Detected | None:
    if not any(LEAF.fullmatch(name) for name in shapes) or any(_OTHERS.fullmatch(name) for name in shapes):
        return None
    per_sample = text_width(shapes, _ATTENTION + r"\.(lora_down|lora_A|lora\.down)\.(default\.)?weight") == CONTEXT_XL
    if not (per_sample or _is_deep(shapes) or any(_SECOND.fullmatch(name) for name in shapes)):
        return None
    for dialect, pattern in _ADAPTERS.items():
        if any(re.fullmatch(pattern, name) for name in shapes):
            return _said("adapter", dialect)
    return None


def _controlnet(shapes: Shapes) -> Detected | None:
    if any(name.startswith("lllite_") and _DEEP.fullmatch(name) for name in shapes):
        return _said("controlnet", "lllite")
    if not is_controlnet(shapes) or text_width(shapes, _ATTENTION + r"\.weight") != CONTEXT_XL:
        return None
    return _said("controlnet", "diffusers" if "controlnet_cond_embedding.conv_in.weight" in shapes else "ldm")


BIG_G = 1280
"""Width of OpenCLIP bigG."""


def _text_encoder(shapes: Shapes) -> Detected | None:
    """OpenCLIP bigG, which other families use as well."""
    tokens = next((shape for name, shape in shapes.items() if name.endswith("token_embedding.weight")), (0, 0))
    if tokens[-1] != BIG_G or any(name.startswith(UNET_PREFIX) for name in shapes):
        return None
    if any(".resblocks." in name for name in shapes):
        return _said("text_encoder", "openclip")
    layer = re.compile(r"(.*\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight")
    return _said("text_encoder", "hf") if any(layer.fullmatch(name) for name in shapes) else None


def _embedding(shapes: Shapes) -> Detected | None:
    return _said("embedding", "kohya") if set(shapes) == {"clip_l", "clip_g"} else None


def _said(
    kind: Kind,
    dialect: str,
    variant: str = "",
    prediction: Literal["eps", "v"] | None = None,
    parts: tuple[str, ...] = (),
    refused: str = "",
) -> Detected:
    return Detected(
        family=FAMILY, kind=kind, dialect=dialect, variant=variant, prediction=prediction, parts=parts, refused=refused
    )


# --- settings without effect ---


def _adapters_only(v: Any) -> bool:
    return bool(v.method != "full")


def _no_common_rate(v: Any) -> bool:
    """Whether no weight goes by learning_rate when a whole model is trained."""
    text = v.train_text_encoder and v.learning_rate_te is None and None in (v.learning_rate_te1, v.learning_rate_te2)
    return bool(v.method == "full" and v.block_lr and not text)


IDLE = (
    Idle(("clip_skip",), lambda v: True, "this model always takes the layer before the last of its text encoders"),
    Idle(("block_lr",), _adapters_only, "it is for `train full`; an adapter's rate on the U-Net is unet_lr"),
    Idle(
        ("learning_rate_te1", "learning_rate_te2"),
        _adapters_only,
        "it is for `train full`; an adapter goes by text_encoder_lr",
    ),
    Idle(
        ("learning_rate_te1", "learning_rate_te2"),
        lambda v: v.method == "full" and not v.train_text_encoder,
        "it needs train_text_encoder",
    ),
    Idle(
        ("learning_rate_te",),
        lambda v: (
            v.method == "full" and v.train_text_encoder and None not in (v.learning_rate_te1, v.learning_rate_te2)
        ),
        "learning_rate_te1 and learning_rate_te2 take its place",
    ),
    Idle(
        ("train_text_encoder",),
        lambda v: v.method == "full" and v.learning_rate_te1 == 0 == v.learning_rate_te2,
        "learning_rate_te1 and learning_rate_te2 are 0",
    ),
    Idle(("learning_rate",), _no_common_rate, "block_lr takes its place"),
)

FACTS = Facts(
    options=Options,
    detect=detect,
    architecture=architecture,
    base_model_version=base_model_version,
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    denoiser_folder="unet",
    needed=("denoiser", "text_encoder"),
    scripts={"sdxl_train_network": "network", "sdxl_train": "full"},
    prompt={"width": 1024, "height": 1024},
    idle=IDLE,
    check=check,
)
