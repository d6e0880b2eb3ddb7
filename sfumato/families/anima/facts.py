"""Anima: options and how files are recognised; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from sfumato.config.rules import Folder, Must, Only, Rate, Weights
from sfumato.config.run import OF_NEW_LITE
from sfumato.families.anima.clients import LOADS_IN
from sfumato.families.anima.network_args import NetworkArgs
from sfumato.models import flow_options
from sfumato.models.detection import (
    DOWN,
    PREFIX,
    Detected,
    Shapes,
    Signature,
    has,
    language_model,
    marked,
    parts,
    qwen_vae,
    width,
    words,
)
from sfumato.models.facts import Facts
from sfumato.models.flow_options import FlowOptions, Sampling, Shift

FAMILY = "anima"
SHIFT = 3.0
"""Towards noise, of samplers."""
LONGEST = 4096
"""Tokens that diffusers' pipeline lets a caption have at most."""
Even = Annotated[int, Interval(ge=2, le=4096), Must(lambda n: n % 2 == 0, "an even number")]
_Tokens = Annotated[int, Interval(ge=1, le=LONGEST)]
LITE_LAYERS = {
    "self_attn_q_pre": r"self_attn\.q_proj",
    "self_attn_kv_pre": r"self_attn\.[kv]_proj",
    "cross_attn_q_pre": r"cross_attn\.q_proj",
    "mlp_fc1_pre": r"mlp\.layer1",
}
"""sd-scripts' names of layers that a ControlNet-LLLite may stand at -> pattern of their paths in a block."""
LITE_SETS = {
    "self_attn_q": ("self_attn_q_pre",),
    "self_attn_qkv": ("self_attn_q_pre", "self_attn_kv_pre"),
    "self_attn_qkv_cross_q": ("self_attn_q_pre", "self_attn_kv_pre", "cross_attn_q_pre"),
}
"""Names for several of them."""


def lite_layers(text: str) -> tuple[str, ...]:
    """`lllite_target_layers` as keys of `LITE_LAYERS`, in their order; none for what is not known."""
    asked = LITE_SETS.get(text.strip()) or [name.strip() for name in text.split(",")]
    return tuple(name for name in LITE_LAYERS if name in asked) if set(asked) <= LITE_LAYERS.keys() else ()


_LITE = Only("lllite", why="only `train lllite` trains a ControlNet-LLLite")
_LiteLayers = Annotated[
    str,
    Must(lite_layers, f"one of {', '.join(LITE_SETS)}, or some of {', '.join(LITE_LAYERS)} with commas between"),
    _LITE,
    OF_NEW_LITE,
]
_ComponentRate = Annotated[Rate | None, Only("full", why="adapters have unet_lr and, in network_args, network_reg_lrs")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(FlowOptions):
    """Settings of Anima alone."""

    family = FAMILY
    timestep_sampling: Sampling = "sigmoid"
    discrete_flow_shift: Shift = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default 1."""
    qwen3: Weights = None
    """Qwen3-0.6B, where the base model's file does not hold it: file, folder or hub id."""
    t5_tokenizer_path: Folder = None
    """Folder of T5's tokenizer; default: `t5_tokenizer` beside the checkpoint if there is one, else the vocabulary that
    comes with sfumato."""
    qwen3_max_token_length: _Tokens = LONGEST
    """Qwen3's tokens of a caption; longer ones are cut."""
    t5_max_token_length: _Tokens = LONGEST
    """T5's tokens of a caption; longer ones are cut. The model has at least 512 rows of text, which shorter captions
    fill with zeros."""
    self_attn_lr: _ComponentRate = None
    """Learning rate of the attention within the image when whole models are trained; default: learning_rate; 0
    freezes."""
    cross_attn_lr: _ComponentRate = None
    """The same of the attention to the text."""
    mlp_lr: _ComponentRate = None
    """The same of the two-layer nets."""
    mod_lr: _ComponentRate = None
    """The same of the modulations."""
    llm_adapter_lr: _ComponentRate = None
    """The same of the text adapter, which holds much of what the model knows of names and is easily spoiled."""
    lllite_target_layers: _LiteLayers = "self_attn_q"
    """Layers of each block that a ControlNet-LLLite stands at: self_attn_q, self_attn_qkv, self_attn_qkv_cross_q, or
    some of self_attn_q_pre, self_attn_kv_pre, cross_attn_q_pre, mlp_fc1_pre with commas between."""
    lllite_cond_dim: Annotated[Even, _LITE, OF_NEW_LITE] = 64
    """Channels of the net by which a ControlNet-LLLite looks at the image: an even number."""
    lllite_cond_resblocks: Annotated[int, Interval(ge=0, le=64), _LITE, OF_NEW_LITE] = 1
    """Residual blocks of that net: more see farther."""
    lllite_use_aspp: Annotated[bool, _LITE, OF_NEW_LITE] = False
    """Let that net look at the image near, far and as a whole (ASPP): for depth or regions more than for lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Options):
    """The options, with what the file says."""

    blocks: int


# --- files ---

NET, VAE, QWEN3 = "net.", "vae.", "text_encoders.qwen3_06b.transformer."
"""What stands before the denoiser's names in the published file, and before others in files that hold several nets."""
BESIDE = {"text_conditioner": "text_conditioner."}
"""The folder in which diffusers keeps the text adapter, which in files is part of the transformer -> what stands before
its names."""
_COSMOS = {
    "native": ("x_embedder.proj.1.weight", "blocks.0.adaln_modulation_self_attn.1.weight"),
    "diffusers": ("patch_embed.proj.weight", "transformer_blocks.0.norm1.linear_1.weight"),
}
_ADAPTER = {"native": "llm_adapter.embed.weight", "diffusers": "text_conditioner.embed.weight"}
_QWEN3_WIDTH, _WIDTH, _TEXT_WIDTH = 1024, 2048, 1024
PATCH_CHANNELS = 68
"""2 x 2 latents of 16 channels and one that marks padding: an image alone."""
_PLAIN = "Cosmos-Predict2, which is Anima's transformer without the text adapter, and is not supported"
_VIDEO = "a Cosmos-Predict2 model that takes {} channels a patch, not {} (one of videos), which is not supported"


def _denoiser(shapes: Shapes) -> Detected | None:
    if has(shapes, r"lllite_dit_blocks_\d+_\w+\.down\.weight"):
        return Detected(family=FAMILY, kind="controlnet", dialect="lllite")
    if (found := marked(shapes, _COSMOS, (NET, PREFIX, ""))) is None:
        return None
    dialect, prefix = found
    channels = shapes[prefix + _COSMOS[dialect][0]][1]
    refused = "" if prefix + _ADAPTER[dialect] in shapes else _PLAIN
    if channels != PATCH_CHANNELS:
        refused = _VIDEO.format(channels, PATCH_CHANNELS)
    return Detected(family=FAMILY, kind="checkpoint", dialect=dialect, parts=parts(shapes, vae=VAE), refused=refused)


_LARGER = 5120
"""Channels of Cosmos-Predict2 14B, whose names are the same."""
_LAYERS = r"((self|cross)_attn[._]((q|k|v|o|output)_proj)|mlp[._](layer[12]|[02])|adaln_modulation_)"


def _own(shapes: Shapes) -> bool:
    """Some video models have diffusers' names too, at other widths."""
    if has(shapes, rf".*blocks[._]\d+[._]{_LAYERS}.*|text_conditioner\..*|.*\.norm[123]\.linear_[12]\..*"):
        return True
    to = rf".*transformer_blocks\.\d+\.attn{{}}\.to_{{}}{DOWN}"
    return (width(shapes, to.format(1, "q")), width(shapes, to.format(2, "k"))) == (_WIDTH, _TEXT_WIDTH)


SIGNATURE = Signature(
    family=FAMILY,
    claims={"anima": ""},
    denoiser=_denoiser,
    adapters={
        rf"(lora_unet|lycoris|oft_unet)_(llm_adapter_)?blocks_\d+_{_LAYERS}.*": "kohya",
        rf"(diffusion_model\.)?(llm_adapter\.)?blocks\.\d+\.{_LAYERS}.*": "comfy",
        r"(transformer\.)?transformer_blocks\.\d+\.(attn[12]\.to_|ff\.net\.|norm[123]\.linear_).*": "peft",
        r"text_conditioner\.blocks\..*": "peft",
    },
    fits=lambda shapes: width(shapes, rf".*blocks[._]\d+[._](self_attn[._][qkv]_proj|mlp[._]layer1){DOWN}") != _LARGER,
    own=_own,
    singles=(*qwen_vae(VAE), *language_model("qwen3", _QWEN3_WIDTH), words("qwen3_06b")),
)


FACTS = Facts(
    options=Options,
    signature=SIGNATURE,
    architecture=lambda options: "anima-preview",
    base_model_version=lambda options: "anima",
    pipelines=("AnimaModularPipeline",),
    denoiser_beside=BESIDE,
    scripts={
        "anima_train_network": "network",
        "anima_train": "full",
        "anima_train_control_net_lllite": "lllite",
    },
    defaults={"sample_sampler": "euler"},
    prompt={"width": 1024, "height": 1024, "sample_steps": 50, "scale": 3.5, "flow_shift": SHIFT},
    refused=flow_options.REFUSED,
    idle=flow_options.IDLE,
    network_args=NetworkArgs,
    metadata=(*flow_options.METADATA, "qwen3_max_token_length", "t5_max_token_length"),
    loads_in=LOADS_IN,
)
