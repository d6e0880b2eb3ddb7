"""FLUX.1 dev and schnell: options and how files are recognised; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from sfumato.config import FamilyOptions, Settings
from sfumato.config.rules import Amount, Count, Idle, Natural, Needs, Weights
from sfumato.families.flux.clients import LOADS_IN
from sfumato.families.flux.network_args import NetworkArgs
from sfumato.models import flow_options
from sfumato.models.detection import DOWN, Detected, Shapes, Signature, has, marked, parts, t5, vae, width, words
from sfumato.models.facts import Facts
from sfumato.models.flow_options import OF_CONTROLNET, OF_NEW, FlowOptions, Sampling, Shift
from sfumato.models.text_options import OWN_RATES, T5Rate, TextEncoderRate, TrainT5

FAMILY = "flux"
SAMPLE_GUIDANCE = 3.5
"""For dev, where a prompt does not set it."""
GUIDANCE = 1.0
"""For dev, while training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlOptions(FlowOptions):
    """What a new ControlNet of FLUX.1 or Chroma is made of."""

    controlnet_latents: Annotated[bool, OF_CONTROLNET, OF_NEW] = False
    """A new ControlNet follows the VAE's latents of an image, as InstantX' do, not its pixels, as XLabs' and
    sd-scripts' do."""
    controlnet_double_blocks: Annotated[Count, OF_CONTROLNET, OF_NEW] = 2
    """How many of the model's first double blocks a new ControlNet has; sd-scripts' have 2."""
    controlnet_single_blocks: Annotated[
        Natural,
        OF_CONTROLNET,
        OF_NEW,
        Needs("controlnet_latents", why="programs differ in how single blocks of nets that follow pixels act"),
    ] = 0
    """How many of the model's first single blocks a new ControlNet has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(ControlOptions):
    """Settings of FLUX.1 alone."""

    family = FAMILY
    timestep_sampling: Sampling = "shift"
    discrete_flow_shift: Shift = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default 3.1582."""
    clip_l: Weights = None
    """CLIP-L, where the base model's file does not hold it: file, folder or hub id."""
    t5xxl: Weights = None
    """T5-XXL, where the base model's file does not hold it: file, folder or hub id."""
    t5xxl_max_token_length: Count | None = None
    """T5's tokens of a caption; longer ones are cut. Default: 512 for dev, 256 for schnell."""
    apply_t5_attn_mask: bool = False
    """Hide T5's padding from everything. The models themselves were trained with it in sight."""
    guidance_scale: Amount | None = None
    """The guidance that dev is given while training; default 1. Schnell takes none."""
    train_t5xxl: TrainT5 = False
    """Train T5 as well where text encoders are trained."""
    learning_rate_te1: TextEncoderRate = None
    """Learning rate of CLIP-L when whole models are trained; default: learning_rate_te."""
    learning_rate_te3: T5Rate = None
    """Learning rate of T5 when whole models are trained; default: learning_rate_te."""
    model_type: Literal["flux"] | None = None
    """kohya's name of the family, which is seen from the file anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Options):
    """The options, with what the file says. guidance_scale and t5xxl_max_token_length are those of the model."""

    t5xxl_max_token_length: int = 512
    guided: bool
    """Whether it takes a guidance: dev does, schnell does not."""
    double_blocks: int
    single_blocks: int


def architecture(options: FamilyOptions) -> str:
    """The model's name in modelspec metadata, without the ending for adapters."""
    schnell = isinstance(options, Completed) and not options.guided
    return "flux-1-schnell" if schnell else "flux-1-dev"


def _own_rates(settings: Settings) -> bool:
    o = Options.of(settings.family)
    return o.learning_rate_te1 is not None and (o.learning_rate_te3 is not None or not o.train_t5xxl)


# --- files ---

CLIP_L, T5XXL, VAE = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", "vae."
"""What stands before names in files that hold several nets, as ComfyUI writes them."""
_MARKS = {
    "bfl": ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_mod.lin.weight"),
    "diffusers": (
        "x_embedder.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
    ),
}
PATCH_CHANNELS = 64
"""16 channels of 2 x 2 latents: an image alone."""
_WIDER = (
    "a FLUX.1 model that takes {} channels a patch, not {} (one for filling, editing or control, such as Fill, Depth "
    "or Canny), which is not supported yet"
)


def _denoiser(shapes: Shapes) -> Detected | None:
    """A model, or a ControlNet, which is made of the same layers."""
    if (found := marked(shapes, _MARKS)) is None:
        return None
    dialect, prefix = found
    variant = _guided(shapes) or "schnell"
    if has(shapes, r"controlnet_(single_)?blocks\..*|controlnet_x_embedder\..*|input_hint_block\..*"):
        return Detected(family=FAMILY, kind="controlnet", dialect=dialect, variant=variant)
    channels = shapes[prefix + _MARKS[dialect][0]][1]
    return Detected(
        family=FAMILY,
        kind="checkpoint",
        dialect=dialect,
        variant=variant,
        parts=parts(shapes, vae=VAE),
        refused="" if channels == PATCH_CHANNELS else _WIDER.format(channels, PATCH_CHANNELS),
    )


def _guided(shapes: Shapes) -> str:
    """ "dev" where a layer takes the guidance."""
    return "dev" if has(shapes, r".*(guidance_in|guidance_embedder)[._].*") else ""


ADAPTERS = {
    r"(lora_unet|lycoris|oft_unet)_(double|single)_blocks_.*|lora_te3_encoder_block_.*": "kohya",
    r"double_blocks\.\d+\.(processor\.)?(qkv|proj)_lora[12]\..*|single_blocks\.\d+\.processor\..*": "xlabs",
    r"(diffusion_model\.)?(double|single)_blocks\..*": "comfy",
    r"(transformer\.)?(single_)?transformer_blocks\..*": "peft",
}
FOREIGN = r"lora_te2_.*|.*(joint_blocks|(img|txt)_mlp[._]fc[12]|byt5_in).*"
"""What adapters of SD3 and HunyuanImage have, whose names are otherwise alike."""
_INPUTS = rf".*([._](qkv|linear1|proj_mlp)|[._]to_[qkv]|add_[qkv]_proj){DOWN}"
"""Factors of a LoRA that are as wide as the transformer."""

SIGNATURE = Signature(
    family=FAMILY,
    claims={"flux-1-dev": "dev", "flux-1-schnell": "schnell", "flux-1": "", "flux1": "", "flux.1": ""},
    denoiser=_denoiser,
    adapters=ADAPTERS,
    foreign=FOREIGN + r"|.*distilled_guidance_layer.*",
    # HunyuanImage's and FLUX.2's, which ComfyUI and diffusers name alike.
    fits=lambda shapes: width(shapes, _INPUTS) not in (3584, 4096, 6144),
    # Qwen-Image and SD3 have `transformer_blocks` as well.
    own=lambda shapes: has(shapes, r".*((double|single)_blocks|single_transformer_blocks|te3_encoder_block).*"),
    variant=_guided,
    singles=(
        *vae(16, VAE),
        *t5(4096),
        words("clip_l", "t5xxl"),
    ),
)


FACTS = Facts(
    options=Options,
    signature=SIGNATURE,
    architecture=architecture,
    base_model_version=lambda options: "flux1",
    # Forge knows an adapter of schnell by it alone.
    swaps_pairs=True,
    implementation="https://github.com/black-forest-labs/flux",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    scripts={"flux_train_network": "network", "flux_train": "full", "flux_train_control_net": "controlnet"},
    defaults={"sample_sampler": "euler"},
    prompt={"width": 1024, "height": 1024, "sample_steps": 20, "scale": 1.0, "guidance_scale": SAMPLE_GUIDANCE},
    refused=flow_options.REFUSED,
    idle=(*flow_options.IDLE, Idle(("learning_rate_te",), _own_rates, OWN_RATES)),
    network_args=NetworkArgs,
    metadata=(*flow_options.METADATA, "guidance_scale", "apply_t5_attn_mask", "t5xxl_max_token_length", "model_type"),
    loads_in=LOADS_IN,
)
