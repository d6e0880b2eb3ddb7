"""Stable Diffusion 1.x and 2.x: options and how files are recognised; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sfumato.config import FamilyOptions, Settings, relations
from sfumato.config.rules import Clash, Count
from sfumato.families.sd.clients import LOADS_IN
from sfumato.families.sd.network_args import NetworkArgs
from sfumato.models.detection import DOWN, Detected, Shapes, Signature, Single, clip, has, marked, parts, vae, width
from sfumato.models.facts import Facts

FAMILY = "sd"
CONTEXT_XL = 2048
"""Width of the text states in Stable Diffusion XL, whose names are otherwise like these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnetOptions(FamilyOptions):
    """Settings of all models with a U-Net."""

    v_parameterization: bool = False
    """The model predicts v instead of noise; default: as the file says, if it does."""
    max_token_length: Literal[75, 150, 225] = 75
    """Tokens of a caption; longer ones are cut. 150 and 225 are encoded in chunks of 75."""
    weighted_captions: bool = False
    """Read `(word:1.3)` and `[word]` in captions as weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(UnetOptions):
    """Settings of Stable Diffusion 1.x and 2.x alone."""

    family = FAMILY
    v2: bool | None = None
    """The base model is Stable Diffusion 2.x; default: as the file says."""
    clip_skip: Count | None = None
    """Use the text encoder's n-th layer from the end; default 1 (the last)."""
    no_token_padding: bool = False
    """Fill captions up to the longest of their batch alone, in the training's steps, as diffusers' DreamBooth does;
    samples have captions of full length."""


def architecture(options: FamilyOptions) -> str:
    """The model's name in modelspec metadata, without the ending for adapters."""
    o = Options.of(options)
    if not o.v2:
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if o.v_parameterization else "stable-diffusion-v2-512"


def base_model_version(options: FamilyOptions) -> str:
    """The model's name in sd-scripts' metadata, `ss_base_model_version`."""
    o = Options.of(options)
    return ("sd_v2" if o.v2 else "sd_v1") + ("_v" if o.v_parameterization else "")


CLASHES = (
    Clash(
        ("no_token_padding",),
        lambda s: Options.of(s.family).no_token_padding and (relations.caches_text(s) or _chunked(s)),
        "captions that are cached or longer than 75 tokens are always padded; leave one of the two out",
    ),
)


def _chunked(settings: Settings) -> bool:
    return Options.of(settings.family).max_token_length > 75


# --- files ---

_MARKS = {"ldm": ("input_blocks.0.0.weight",), "diffusers": ("conv_in.weight",)}
TO_K = r".*attn2[._]to_k"
"""Keys of the attention to the text."""


def _denoiser(shapes: Shapes) -> Detected | None:
    found, context = marked(shapes, _MARKS), width(shapes, TO_K + r"\.weight")
    if control := controlnet(shapes):
        known = context != CONTEXT_XL
        return Detected(family=FAMILY, kind="controlnet", dialect=control, variant=_variant(shapes)) if known else None
    if found is None or context in (None, CONTEXT_XL) or has(shapes, _LARGER):
        return None
    return Detected(
        family=FAMILY,
        kind="checkpoint",
        dialect=found[0] if found[1] or found[0] == "diffusers" else "native",
        variant=_variant(shapes),
        prediction="v" if "v_pred" in shapes else None,
        parts=parts(shapes, text_encoder="cond_stage_model."),
    )


def controlnet(shapes: Shapes) -> str:
    """The dialect of a ControlNet, which is otherwise half a U-Net; empty: it is none."""
    if "controlnet_cond_embedding.conv_in.weight" in shapes:
        return "diffusers"
    return "ldm" if has(shapes, r"(control_model\.)?zero_convs\.0\.0\.weight") else ""


def _variant(shapes: Shapes) -> str:
    """2.x projects into its transformers by linear layers, 1.x by convolutions."""
    pattern = re.compile(rf".*[._]proj_in({DOWN}|\.weight)")
    shape = next((shape for name, shape in shapes.items() if pattern.fullmatch(name)), None)
    return "" if shape is None else "v2" if len(shape) == 2 else "v1"


UNET, UNET_DIFFUSERS = "(input_blocks|middle_block|output_blocks)", "(down_blocks|mid_block|up_blocks)"
_LARGER = (
    r"lora_te[12]_.*|text_encoder_2\..*|text_encoders\.clip_g\..*|.*transformer_blocks[._][1-9]\d*[._].*"
    r"|.*(double|joint|single_transformer)_blocks.*"
)
"""What Stable Diffusion XL and the transformers have, whose names begin alike."""
_CLIP = {768: "v1", 1024: "v2"}

SIGNATURE = Signature(
    family=FAMILY,
    claims={"stable-diffusion-v1": "v1", "stable-diffusion-v2": "v2", "sd_v1": "v1", "sd_v2": "v2"},
    denoiser=_denoiser,
    adapters={
        rf"(lora_unet|lycoris)_({UNET}|{UNET_DIFFUSERS}|time_emb|conv_in|conv_out).*": "kohya",
        r"lora_te_text_model_encoder_layers_.*": "kohya",
        rf"diffusion_model\.{UNET}\..*|text_encoders\.clip_[lh]\..*": "comfy",
        rf"(unet\.)?{UNET_DIFFUSERS}\..*|text_encoder\.(text_model\.)?encoder\.layers\..*": "peft",
    },
    foreign=_LARGER,
    fits=lambda shapes: width(shapes, TO_K + DOWN) != CONTEXT_XL,
    variant=_variant,
    singles=(
        *vae(4, "first_stage_model."),
        *(single for columns, variant in _CLIP.items() for single in clip(columns, variant)),
        *(
            Single(kind="embedding", dialect=dialect, tensors=dict.fromkeys(names, (None, columns)), variant=variant)
            for dialect, *names in (("kohya", "emb_params"), ("a1111", r"string_to_param\..*"), ("xti", "IN01", "MID"))
            for columns, variant in _CLIP.items()
        ),
    ),
)


FACTS = Facts(
    options=Options,
    signature=SIGNATURE,
    architecture=architecture,
    base_model_version=base_model_version,
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    denoiser_folder="unet",
    needed=("denoiser", "text_encoder"),
    scripts={
        "train_network": "network",
        "fine_tune": "full",
        "train_db": "full",
        "train_control_net": "controlnet",
        "train_controlnet": "controlnet",
        "train_textual_inversion": "embedding",
        "train_textual_inversion_XTI": "embedding",
    },
    script_settings={"train_textual_inversion_XTI": {"xti": True}},
    trains_text=("train_db",),
    clashes=CLASHES,
    loads_in=LOADS_IN,
    network_args=NetworkArgs,
)
