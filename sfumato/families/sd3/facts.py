"""Stable Diffusion 3 and 3.5: options and how files are recognised; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from sfumato.config import FamilyOptions, Settings
from sfumato.config.rules import Clash, Count, Idle, Positive, Share, Weights
from sfumato.families.sd3.clients import LOADS_IN
from sfumato.families.sd3.network_args import NetworkArgs
from sfumato.models import flow_options
from sfumato.models.detection import DOWN, Detected, Shapes, Signature, has, marked, parts, width, words
from sfumato.models.facts import Facts
from sfumato.models.flow_options import OF_CONTROLNET, OF_NEW, FlowOptions, Scheme, Shift
from sfumato.models.text_options import OWN_RATES, T5Rate, TextEncoderRate, TrainT5

FAMILY = "sd3"
SCALE, VAE_SHIFT = 1.5305, 0.0609
"""From raw latents to those of the transformer: (x - shift) * scale."""
SHIFT = 3.0
"""Towards noise, of training and of samplers (arXiv:2403.03206, 5.3.2)."""
Version = Literal["medium", "3.5-medium", "3.5-large"]
LONGEST = 512
"""Tokens that diffusers' pipeline lets T5 have at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(FlowOptions):
    """Settings of Stable Diffusion 3 and 3.5 alone."""

    family = FAMILY
    # None stands for what goes with timestep_sampling; `Completed` has it filled in.
    weighting_scheme: Scheme | None = None  # type: ignore[assignment]
    """logit_normal and mode: the density of timestep_sampling sigma. sigma_sqrt and cosmap: weights of the loss. none,
    uniform: neither. Default: logit_normal with timestep_sampling sigma, else uniform."""
    logit_mean: float | None = None
    logit_std: Positive | None = None
    discrete_flow_shift: Shift = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default 3."""
    training_shift: Shift = None
    """The same by the name that sd-scripts has for it here."""
    clip_l: Weights = None
    """CLIP-L, where the base model's file does not hold it: file, folder or hub id."""
    clip_g: Weights = None
    """CLIP-G, where the base model's file does not hold it: file, folder or hub id."""
    t5xxl: Weights = None
    """T5-XXL, where the base model's file does not hold it: file, folder or hub id. Without it the model is given
    zeros in its place."""
    t5xxl_max_token_length: Annotated[int, Interval(ge=1, le=LONGEST)] = 256
    """T5's tokens of a caption; longer ones are cut."""
    apply_lg_attn_mask: bool = False
    """Make zero what CLIP-L and CLIP-G say of padding, which the model otherwise takes, as in pipelines."""
    apply_t5_attn_mask: bool = False
    """Hide padding from T5 and make zero what it says of it, which the model otherwise takes, as in pipelines."""
    controlnet_blocks: Annotated[Count | None, OF_CONTROLNET, OF_NEW] = None
    """How many of the model's first blocks a new ControlNet has; default: half of them."""
    clip_l_dropout_rate: Share = 0.0
    """Chance that a sample is trained without what CLIP-L says."""
    clip_g_dropout_rate: Share = 0.0
    """Chance that a sample is trained without what CLIP-G says."""
    t5_dropout_rate: Share = 0.0
    """Chance that a sample is trained without what T5 says."""
    pos_emb_random_crop_rate: Share = 0.0
    """Chance that a sample is trained elsewhere than in the middle of the table of positions (as 3.5 medium was)."""
    enable_scaled_pos_embed: bool = False
    """Let images of any size span the positions of one of 1024 x 1024 while training, and not those of its middle."""
    train_t5xxl: TrainT5 = False
    """Train T5 as well where text encoders are trained."""
    learning_rate_te1: TextEncoderRate = None
    """Learning rate of CLIP-L when whole models are trained; default: learning_rate_te; 0 freezes."""
    learning_rate_te2: TextEncoderRate = None
    """The same of CLIP-G."""
    learning_rate_te3: T5Rate = None
    """The same of T5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Options):
    """The options with what the files say; weighting_scheme is set, and training_shift stands in
    discrete_flow_shift."""

    version: Version
    blocks: int
    has_t5: bool


def scheme(options: Options) -> str:
    """The weighting_scheme, its default filled in: that of the paper (arXiv:2403.03206) where it can act."""
    return options.weighting_scheme or ("logit_normal" if options.timestep_sampling == "sigma" else "uniform")


def architecture(options: FamilyOptions) -> str:
    """The model's name in modelspec metadata, without the ending for adapters."""
    version = options.version if isinstance(options, Completed) else "medium"
    return f"stable-diffusion-{version}" if version.startswith("3.5") else f"stable-diffusion-3-{version}"


def base_model_version(options: FamilyOptions) -> str:
    """The model's name in kohya's metadata, `ss_base_model_version`."""
    version = options.version if isinstance(options, Completed) else "medium"
    return {"medium": "sd3_m", "3.5-medium": "sd3.5_m", "3.5-large": "sd3.5_l"}[version]


def _own_rates(settings: Settings) -> bool:
    o = Options.of(settings.family)
    t5 = o.learning_rate_te3 is not None or not o.train_t5xxl
    return o.learning_rate_te1 is not None and o.learning_rate_te2 is not None and t5


def _two_shifts(settings: Settings) -> bool:
    o = Options.of(settings.family)
    return o.training_shift is not None and o.discrete_flow_shift is not None


IDLE = (
    *flow_options.IDLE,
    Idle(
        ("logit_mean", "logit_std"),
        lambda s: scheme(Options.of(s.family)) != "logit_normal",
        "only weighting_scheme logit_normal has it",
    ),
    Idle(("learning_rate_te",), _own_rates, OWN_RATES),
)
CLASHES = (
    Clash(
        ("training_shift",),
        _two_shifts,
        "is the same as discrete_flow_shift, which is set as well; leave one of the two out",
    ),
)


# --- files ---

_MARKS = {
    "native": ("x_embedder.proj.weight", "y_embedder.mlp.0.weight", "joint_blocks.0.x_block.attn.qkv.weight"),
    "diffusers": (
        "pos_embed.proj.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.attn.add_k_proj.weight",
    ),
}


def _denoiser(shapes: Shapes) -> Detected | None:
    """A model, or a ControlNet, which is made of the same layers but may lack the embedders of text and class."""
    control = has(shapes, r"(.*\.)?(controlnet_blocks|pos_embed_input)\..*")
    marks = {dialect: names[-1:] if control else names for dialect, names in _MARKS.items()}
    if (found := marked(shapes, marks)) is None:
        return None
    return Detected(
        family=FAMILY,
        kind="controlnet" if control else "checkpoint",
        dialect=found[0],
        variant=version(shapes),
        parts=() if control else parts(shapes),
    )


def version(shapes: Shapes) -> Version:
    """3.5 normalises queries and keys; 3.5 medium attends twice in some blocks."""
    if has(shapes, r"(.*\.)?attn2\..*"):
        return "3.5-medium"
    return "3.5-large" if has(shapes, r".*\.attn\.(ln_q|norm_q)\..*") else "medium"


_WIDTHS: dict[int | None, str] = {1536: "", 2432: "3.5-large"}
"""Channels of the transformer -> what adapters are for; 3 medium's and 3.5 medium's are alike but for the second
attention, which may be left out."""
_TO_BLOCKS = rf".*([._]qkv|_blocks\.\d+\.attn2?\.(to_[qkv]|add_[qkv]_proj)){DOWN}"


def _version_of_adapter(shapes: Shapes) -> str:
    twice = has(shapes, r".*[._]attn2[._].*")
    return "3.5-medium" if twice else _WIDTHS.get(width(shapes, _TO_BLOCKS), "")


SIGNATURE = Signature(
    family=FAMILY,
    claims={
        "stable-diffusion-3-medium": "medium",
        "stable-diffusion-3.5-medium": "3.5-medium",
        "stable-diffusion-3.5-large": "3.5-large",
        "sd3_m": "medium",
        "sd3.5_m": "3.5-medium",
        "sd3.5_l": "3.5-large",
    },
    denoiser=_denoiser,
    adapters={
        r"(lora_unet|lycoris|oft_unet)_joint_blocks_.*": "kohya",
        r"(diffusion_model\.)?joint_blocks\..*": "comfy",
        r"(transformer\.)?transformer_blocks\..*": "peft",
    },
    foreign=r".*single_transformer_blocks.*",
    # Other models have `transformer_blocks` as well, of other widths.
    own=lambda shapes: has(shapes, r".*joint_blocks.*") or width(shapes, _TO_BLOCKS) in _WIDTHS,
    variant=_version_of_adapter,
    singles=(words("clip_l", "clip_g", "t5xxl"),),
)


FACTS = Facts(
    options=Options,
    signature=SIGNATURE,
    architecture=architecture,
    base_model_version=base_model_version,
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    scripts={"sd3_train_network": "network", "sd3_train": "full"},
    defaults={"sample_sampler": "euler"},
    prompt={"width": 1024, "height": 1024, "sample_steps": 28, "scale": 5.0, "flow_shift": SHIFT},
    refused=flow_options.REFUSED,
    idle=IDLE,
    clashes=CLASHES,
    network_args=NetworkArgs,
    metadata=(
        *flow_options.METADATA,
        *("apply_lg_attn_mask", "apply_t5_attn_mask", "t5xxl_max_token_length"),
        *("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate", "pos_emb_random_crop_rate"),
    ),
    loads_in=LOADS_IN,
)
