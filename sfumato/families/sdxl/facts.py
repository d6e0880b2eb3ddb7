"""Stable Diffusion XL: options and how files are recognised; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sfumato.config import FamilyOptions, Settings
from sfumato.config.rules import Amount, Count, Idle, Must, Only
from sfumato.families.sd.facts import CONTEXT_XL, TO_K, UNET, UNET_DIFFUSERS, UnetOptions, controlnet
from sfumato.families.sd.network_args import total
from sfumato.families.sdxl.clients import LOADS_IN
from sfumato.families.sdxl.network_args import UNET_BLOCKS, NetworkArgs
from sfumato.models.detection import DOWN, Detected, Shapes, Signature, clip, has, marked, parts, width, words
from sfumato.models.facts import Facts
from sfumato.models.text_options import OWN_RATES, TextEncoderRate

FAMILY = "sdxl"
BLOCKS = total(UNET_BLOCKS)
"""Values of block_lr: 0 what time and sizes go through, 1-9 `input_blocks`, 10-12 `middle_block`, 13-21
`output_blocks`, 22 `out`."""
SIZE_WIDTH = 256
"""Numbers that each of the embedded sizes takes in the label, which begins with the pooled text."""
SIZES = 6
"""Sizes that the base model takes: original height and width, crop top and left, target height and width."""
SIZES_REFINER = 5
"""Sizes that the refiner takes: an aesthetic score stands for the target's two."""

_NO_CLIP_SKIP = Only(why="this model always takes the layer before the last of its text encoders")
_BLOCK_LR = Must(lambda rates: len(rates) in (0, BLOCKS), f"{BLOCKS} numbers with commas between them")
_FULL = Only("full", why="it is for `train full`; an adapter's rate on the U-Net is unet_lr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(UnetOptions):
    """Settings of Stable Diffusion XL alone."""

    family = FAMILY
    clip_skip: Annotated[Count | None, _NO_CLIP_SKIP] = None
    """No effect: this model was made for the layer before the last of both text encoders, and takes no other."""
    learning_rate_te1: TextEncoderRate = None
    """Learning rate of the first text encoder (CLIP-L) when a whole model is trained; default: learning_rate_te; 0
    freezes it."""
    learning_rate_te2: TextEncoderRate = None
    """Learning rate of the second text encoder (OpenCLIP bigG) when a whole model is trained; default:
    learning_rate_te; 0 freezes it."""
    block_lr: Annotated[tuple[Amount, ...], _BLOCK_LR, _FULL] = ()
    """Learning rates of the U-Net's blocks when a whole model is trained, 23 numbers: time and size embeddings, 9 input
    blocks, 3 middle blocks, 9 output blocks, the last layer; 0 freezes a block."""


def architecture(options: FamilyOptions) -> str:
    """The model's name in modelspec metadata, without the ending for adapters."""
    return "stable-diffusion-xl-v1-base"


def base_model_version(options: FamilyOptions) -> str:
    """The model's name in sd-scripts' metadata, `ss_base_model_version`."""
    return "sdxl_base_v1-0"


# --- files ---

_MARKS = {"ldm": ("label_emb.0.0.weight",), "diffusers": ("add_embedding.linear_1.weight",)}
_DEEP = r".*(down|mid|up|input|middle|output)_blocks?[._].*transformer_blocks[._][1-9]\d*[._].*"
"""A second transformer block in one place, which the U-Nets of Stable Diffusion 1.x and 2.x do not have."""
_REFINER = "the refiner of Stable Diffusion XL; what is trained is the base model"


def _denoiser(shapes: Shapes) -> Detected | None:
    context = width(shapes, TO_K + r"\.weight") or 0
    found, control = marked(shapes, _MARKS), "lllite" if has(shapes, f"lllite_{_DEEP}") else controlnet(shapes)
    if control:
        known = control == "lllite" or context == CONTEXT_XL
        return Detected(family=FAMILY, kind="controlnet", dialect=control) if known else None
    if found is None or not has(shapes, _DEEP):
        return None
    label = shapes[found[1] + _MARKS[found[0]][0]][1]
    # The refiner has one text encoder, whose states and pooled text have the same width.
    refiner = label - SIZES_REFINER * SIZE_WIDTH == context
    if not refiner and not 0 < label - SIZES * SIZE_WIDTH < context:
        return None
    return Detected(
        family=FAMILY,
        kind="checkpoint",
        dialect=found[0] if found[1] or found[0] == "diffusers" else "native",
        variant="refiner" if refiner else "",
        prediction="v" if "v_pred" in shapes else None,
        parts=parts(shapes, text_encoder="conditioner.embedders."),
        refused=_REFINER if refiner else "",
    )


_SECOND = r"lora_te2_.*|text_encoder_2\..*|text_encoders\.clip_g\..*"
"""The second text encoder, of an adapter for text encoders alone."""


def _own(shapes: Shapes) -> bool:
    return width(shapes, TO_K + DOWN) == CONTEXT_XL or has(shapes, f"{_DEEP}|{_SECOND}")


SIGNATURE = Signature(
    family=FAMILY,
    claims={"stable-diffusion-xl": "", "sdxl": ""},
    denoiser=_denoiser,
    adapters={
        rf"(lora_unet|oft_unet|lycoris)_({UNET}|{UNET_DIFFUSERS}).*|lora_te2_text_model_encoder_layers_.*": "kohya",
        rf"diffusion_model\.{UNET}\..*|text_encoders\.clip_g\..*": "comfy",
        rf"(unet\.)?{UNET_DIFFUSERS}\..*|text_encoder_2\.(text_model\.)?encoder\.layers\..*": "peft",
    },
    # Of transformers, whose adapters have names in common with these.
    foreign=r".*(double|joint|single_transformer)_blocks.*|(transformer|lora_transformer)[._].*|lora_te3_.*",
    fits=lambda shapes: _own(shapes) or width(shapes, TO_K + DOWN) is None,
    own=_own,
    singles=(
        *clip(1280),
        words("clip_l", "clip_g", dialect="kohya"),
    ),
)


# --- settings without effect ---


def _own_rates(settings: Settings) -> bool:
    o = Options.of(settings.family)
    return o.learning_rate_te1 is not None and o.learning_rate_te2 is not None


def _freezes_text(settings: Settings) -> bool:
    o = Options.of(settings.family)
    return settings.method == "full" and o.learning_rate_te1 == 0 == o.learning_rate_te2


def _no_common_rate(settings: Settings) -> bool:
    """Whether no weight goes by learning_rate when a whole model is trained."""
    text = settings.train_text_encoder and settings.learning_rate_te is None and not _own_rates(settings)
    return settings.method == "full" and bool(Options.of(settings.family).block_lr) and not text


IDLE = (
    Idle(("learning_rate_te",), _own_rates, OWN_RATES),
    Idle(("train_text_encoder",), _freezes_text, "learning_rate_te1 and learning_rate_te2 are 0"),
    Idle(("learning_rate",), _no_common_rate, "block_lr takes its place"),
)

FACTS = Facts(
    options=Options,
    signature=SIGNATURE,
    architecture=architecture,
    base_model_version=base_model_version,
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    denoiser_folder="unet",
    needed=("denoiser", "text_encoder"),
    scripts={
        "sdxl_train_network": "network",
        "sdxl_train": "full",
        "sdxl_train_textual_inversion": "embedding",
        "sdxl_train_control_net": "controlnet",
        "sdxl_train_control_net_lllite": "lllite",
        "sdxl_train_control_net_lllite_old": "lllite",
    },
    script_defaults={"sdxl_train_control_net": {"control_net_lr": 1e-4}},
    prompt={"width": 1024, "height": 1024},
    idle=IDLE,
    loads_in=LOADS_IN,
    network_args=NetworkArgs,
)
