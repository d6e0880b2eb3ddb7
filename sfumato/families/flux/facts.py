"""FLUX.1 dev and schnell: options and how files are recognised; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from sfumato.families.flux.network_args import NetworkArgs
from sfumato.models import flow_options
from sfumato.models.facts import LEAF, WHOLE, Detected, Facts, Idle, Kind, Shapes
from sfumato.models.flow_options import FlowOptions

FAMILY = "flux"
DRAWN_GUIDANCE = 3.5
"""What dev is told where a prompt does not say it."""
GUIDANCE = 1.0
"""What dev is told while training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(FlowOptions):
    """What a run can be told about FLUX.1."""

    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"] = "shift"
    """How noise levels are drawn. sigma: by weighting_scheme, then shifted; uniform: evenly; sigmoid: the sigmoid of a
    normal number; shift: the same, then shifted; flux_shift: the same, shifted the more the larger the image is."""
    discrete_flow_shift: float | None = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default 3.1582."""
    clip_l: str | None = None
    """CLIP-L, where the base model's file does not hold it: file, folder or hub id."""
    t5xxl: str | None = None
    """T5-XXL, where the base model's file does not hold it: file, folder or hub id."""
    t5xxl_max_token_length: int | None = None
    """T5's tokens of a caption; longer ones are cut. Default: 512 for dev, 256 for schnell."""
    apply_t5_attn_mask: bool = False
    """Hide T5's padding from everything. The models themselves were trained with it in sight."""
    guidance_scale: float | None = None
    """The guidance that dev is told while training; default 1. Schnell is told none."""
    train_t5xxl: bool = False
    """Train T5 as well where text encoders are trained."""
    learning_rate_te1: float | None = None
    """Learning rate of CLIP-L when whole models are trained; default: learning_rate_te."""
    learning_rate_te3: float | None = None
    """Learning rate of T5 when whole models are trained; default: learning_rate_te."""
    model_type: Literal["flux"] | None = None
    """kohya's name of the family, which is seen from the file anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Options):
    """The options, with what the file says. guidance_scale and t5xxl_max_token_length are those of the model."""

    guided: bool
    """Whether it is told a guidance: dev is, schnell is not."""
    double_blocks: int
    single_blocks: int


def architecture(options: Options) -> str:
    """The model's name in modelspec metadata, without the ending for adapters."""
    schnell = isinstance(options, Completed) and not options.guided
    return "flux-1-schnell" if schnell else "flux-1-dev"


_TE_RATES = ("learning_rate_te1", "learning_rate_te3")


def check(options: Any) -> list[str]:
    """For `Facts.check`."""
    length = options.t5xxl_max_token_length
    wrong = [*flow_options.check(options), *negative(options, ("guidance_scale", *_TE_RATES))]
    return (
        wrong
        if length is None or length > 0
        else [*wrong, f"t5xxl_max_token_length: expected 1 or more, found {length}"]
    )


def negative(options: Any, names: Iterable[str]) -> list[str]:
    """A message for each of these options that is below 0."""
    given = {name: getattr(options, name) for name in names}
    return [
        f"{name}: expected 0 or more, found {value:g}"
        for name, value in given.items()
        if value is not None and value < 0
    ]


def _trains_text(v: Any) -> bool:
    return bool(v.method == "full" and v.train_text_encoder)


IDLE = (
    *flow_options.IDLE,
    Idle(
        _TE_RATES,
        lambda v: v.method != "full",
        "an adapter's text encoders go by text_encoder_lr and network_train_unet_only",
    ),
    Idle(
        (*_TE_RATES, "train_t5xxl"),
        lambda v: v.method == "full" and not v.train_text_encoder,
        "it needs train_text_encoder",
    ),
    Idle(("learning_rate_te3",), lambda v: _trains_text(v) and not v.train_t5xxl, "it needs train_t5xxl as well"),
    Idle(
        ("learning_rate_te",),
        lambda v: (
            _trains_text(v) and v.learning_rate_te1 is not None and not (v.train_t5xxl and v.learning_rate_te3 is None)
        ),
        "learning_rate_te1 (for T5 learning_rate_te3) takes its place",
    ),
    Idle(
        ("train_t5xxl",),
        lambda v: (
            v.method != "full"
            and (v.network_train_unet_only or v.cache_text_encoder_outputs or v.cache_text_encoder_outputs_to_disk)
        ),
        "network_train_unet_only and cache_text_encoder_outputs leave the text encoders alone",
    ),
)


# --- files ---

PREFIX = "model.diffusion_model."
CLIP_L, T5XXL, VAE = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", "vae."
"""What stands before names in files that hold several nets, as ComfyUI writes them."""
_BFL = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_mod.lin.weight")
_DIFFUSERS = (
    "x_embedder.weight",
    "context_embedder.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "transformer_blocks.0.norm1_context.linear.weight",
)
PATCH_CHANNELS = 64
"""16 channels of 2 x 2 latents: an image alone."""
_CONTROL = re.compile(r"controlnet_(single_)?blocks\..*|controlnet_x_embedder\..*|input_hint_block\..*")
_WIDER = (
    "a FLUX.1 model that takes {} channels a patch, not {} (one for filling, editing or control, such as Fill, Depth "
    "or Canny), "
    "which is not supported yet"
)
_GUIDANCE = re.compile(r".*(guidance_in|guidance_embedder)[._].*")


def detect(shapes: Shapes) -> Detected | None:
    """What a file with these tensors is, if it is of this family."""
    found = _transformer(shapes)
    if found or any(name.startswith(PREFIX) for name in shapes):  # bundles of other families hold the same T5 and VAE
        return found
    return _adapter(shapes) or _vae(shapes) or _text_encoder(shapes)


def _transformer(shapes: Shapes) -> Detected | None:
    """A model, or a ControlNet, which is made of the same layers."""
    for dialect, prefix, marks in (("bfl", PREFIX, _BFL), ("bfl", "", _BFL), ("diffusers", "", _DIFFUSERS)):
        if not all(prefix + mark in shapes for mark in marks):
            continue
        variant = "dev" if any(_GUIDANCE.fullmatch(name) for name in shapes) else "schnell"
        if any(_CONTROL.fullmatch(name) for name in shapes):
            return _said("controlnet", dialect, variant)
        prefixes = (prefix, "text_encoders.", VAE)
        parts = tuple(
            part
            for part, p in zip(WHOLE, prefixes, strict=True)
            if part == "denoiser" or any(name.startswith(p) for name in shapes)
        )
        channels = shapes[prefix + marks[0]][1]
        refused = "" if channels == PATCH_CHANNELS else _WIDER.format(channels, PATCH_CHANNELS)
        return replace(_said("checkpoint", dialect, variant), parts=parts, refused=refused)
    return None


_LAYERS = (
    r"double_blocks{0}\d+{0}(img|txt)_(attn{0}(qkv|proj)|mlp{0}[02]|mod{0}lin)",
    r"single_blocks{0}\d+{0}(linear[12]|modulation{0}lin)",
)
_ADAPTERS = {
    "kohya": rf"(lora_unet|lycoris|oft_unet)_({'|'.join(layer.format('_') for layer in _LAYERS)})\..*"
    r"|lora_te3_encoder_block_.*",
    "comfy": rf"(diffusion_model\.)?({'|'.join(layer.format('[.]') for layer in _LAYERS)})\..*",
    "peft": r"(transformer\.)?single_transformer_blocks\.\d+\..*",
}
_OTHERS = re.compile(r"lora_te2_.*|.*(joint_blocks|(img|txt)_mlp[._]fc[12]|byt5_in|distilled_guidance_layer).*")
"""What HunyuanImage, SD3 and Chroma have, whose names are otherwise alike."""


def _adapter(shapes: Shapes) -> Detected | None:
    if not any(LEAF.fullmatch(name) for name in shapes) or any(_OTHERS.fullmatch(name) for name in shapes):
        return None
    for dialect, pattern in _ADAPTERS.items():
        if any(re.fullmatch(pattern, name) for name in shapes):
            return _said("adapter", dialect, "dev" if any(_GUIDANCE.fullmatch(name) for name in shapes) else "")
    return None


def _vae(shapes: Shapes) -> Detected | None:
    """The VAE of SD3 has the same names and shapes; those of Lumina and Chroma are this one."""
    for dialect, first in (
        ("ldm", "encoder.down.0.block.0.conv1.weight"),
        ("diffusers", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    ):
        for prefix in ("", VAE):
            # Sixteen channels in: a convolution of two dimensions. That of video models has three.
            conv = shapes.get(f"{prefix}decoder.conv_in.weight", ())
            if f"{prefix}{first}" in shapes and len(conv) == 4 and conv[1] == 16:
                return _said("vae", dialect)
    return None


def _text_encoder(shapes: Shapes) -> Detected | None:
    """T5's encoder; other families know CLIP-L, which they use as well."""
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return _said("text_encoder", "hf") if any(prefix + first in shapes for prefix in ("", T5XXL)) else None


def _said(kind: Kind, dialect: str, variant: str = "") -> Detected:
    return Detected(family=FAMILY, kind=kind, dialect=dialect, variant=variant)


FACTS = Facts(
    options=Options,
    detect=detect,
    architecture=architecture,
    base_model_version=lambda options: "flux1",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    scripts={"flux_train_network": "network", "flux_train": "full"},
    defaults={"sample_sampler": "euler"},
    prompt={"width": 1024, "height": 1024, "sample_steps": 20, "scale": 1.0, "guidance_scale": DRAWN_GUIDANCE},
    paths=("clip_l", "t5xxl"),
    refused=flow_options.REFUSED,
    idle=IDLE,
    check=check,
    network_args=NetworkArgs,
    metadata=(*flow_options.METADATA, "guidance_scale", "apply_t5_attn_mask", "t5xxl_max_token_length", "model_type"),
)
