"""Lumina Image 2.0: options and how files are recognised; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.config.rules import Count, Weights
from sfumato.families.lumina2.clients import LOADS_IN
from sfumato.families.lumina2.network_args import NetworkArgs
from sfumato.models import flow_options
from sfumato.models.detection import DOWN, Detected, Shapes, Signature, has, language_model, marked, parts, width, words
from sfumato.models.facts import Facts
from sfumato.models.flow_options import FlowOptions, NextditSampling, Shift

FAMILY = "lumina2"
SHIFT = 6.0
"""Towards noise, of training and of samplers (https://huggingface.co/Alpha-VLLM/Lumina-Image-2.0)."""
WIDTH = 2304
"""Channels of the transformer, and of Gemma-2-2B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(FlowOptions):
    """Settings of Lumina Image 2.0 alone."""

    family = FAMILY
    timestep_sampling: NextditSampling = "shift"  # type: ignore[assignment]
    """How noise levels are chosen. sigma: by weighting_scheme, then shifted; uniform: evenly; sigmoid: the sigmoid of a
    normal number; shift: the same, then shifted; flux_shift: the same, shifted the more the larger the image is;
    nextdit_shift: evenly, then shifted as flux_shift."""
    discrete_flow_shift: Shift = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default 6."""
    gemma2: Weights = None
    """Gemma-2-2B, where the base model's file does not hold it: file, folder or hub id."""
    gemma2_max_token_length: Count = 256
    """Gemma's tokens of a caption, those of the system prompt included; longer ones are cut."""
    system_prompt: str | None = None
    """What Gemma reads before each caption and prompt, `system_prompt <Prompt Start> caption`, but not before negative
    prompts and captions that are empty or dropped. Default: nothing. The published models had "You are an assistant
    designed to generate superior images with the superior degree of image-text alignment based on textual prompts or
    user prompts." and others."""


# --- files ---

GEMMA, VAE = "text_encoders.gemma2_2b.", "vae."
"""What stands before names in files that hold several nets, as ComfyUI writes them."""
_STACKS = r"(layers|noise_refiner|context_refiner)"
_MARKS = {
    "native": ("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight", "layers.0.attention.qkv.weight"),
    "diffusers": (
        "time_caption_embed.caption_embedder.1.weight",
        "context_refiner.0.attn.to_q.weight",
        "layers.0.attn.to_q.weight",
    ),
}
_RELATIVES = {
    r"(.*\.)?(clip_text_pooled_proj|time_text_embed)\..*": (
        "a NewBie model of its own net, which reads captions with Gemma 3 and a CLIP and is not supported yet"
    ),
    r"(.*\.)?(cap_pad_token|x_pad_token|layers\.0\.adaLN_modulation\.0\.weight)": (
        "a Z-Image model, which is not supported yet"
    ),
    r"(.*\.)?ref_image_(refiner|patch_embedder)\..*": "an OmniGen2 model, which is not supported yet",
}
"""Pattern of a name that only these have of the models made of the same blocks -> what they are."""


def _denoiser(shapes: Shapes) -> Detected | None:
    if (found := marked(shapes, _MARKS)) is None:
        return None
    refused = next((what for pattern, what in _RELATIVES.items() if has(shapes, pattern)), "")
    held = parts(shapes, vae=VAE)
    return Detected(family=FAMILY, kind="checkpoint", dialect=found[0], parts=held, refused=refused)


_INPUTS = (
    rf".*{_STACKS}[._]\d+[._](attention[._](qkv|out)|attn[._]to_([qkv]|out[._]0)|feed_forward[._](w|linear_)[13]){DOWN}"
    rf"|.*layers[._]\d+[._](self_attn[._][qkv]_proj|mlp[._](gate|up)_proj){DOWN}"
)
"""Factors of a LoRA that are as wide as the transformer, or as Gemma."""


def _own(shapes: Shapes) -> bool:
    """Other models have layers of these names, of other widths; of adapters without such factors the names decide."""
    found = width(shapes, _INPUTS)
    return (
        has(shapes, rf".*{_STACKS}[._]\d+[._](attention|attn|feed_forward|adaLN_modulation|norm1)[._].*")
        if (found is None)
        else found == WIDTH
    )


SIGNATURE = Signature(
    family=FAMILY,
    claims={"lumina-2": "", "lumina2": ""},
    denoiser=_denoiser,
    adapters={
        rf"(lora_unet|lycoris|oft_unet)_{_STACKS}_\d+_(attention|feed_forward|adaLN)_.*|lora_te_layers_\d+_.*": "kohya",
        rf"(diffusion_model\.)?{_STACKS}\.\d+\.(attention\.(qkv|out)|feed_forward\.w\d|adaLN_modulation)\..*": "comfy",
        r"text_encoders\.gemma2_2b\..*": "comfy",
        rf"(transformer\.)?{_STACKS}\.\d+\.(attn\.to_\w+|feed_forward\.linear_\d|norm1)\..*": "peft",
    },
    # Z-Image's and NewBie's.
    foreign=r".*attention[._]to_[qkv]([._].*)?|.*adaLN_modulation[._]0[._].*|.*(clip_text_pooled_proj|time_text_embed).*",
    own=_own,
    singles=(*language_model("gemma2", WIDTH), words("gemma2_2b")),
)


FACTS = Facts(
    options=Options,
    signature=SIGNATURE,
    architecture=lambda options: "lumina-2",
    base_model_version=lambda options: "lumina2",
    pipelines=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
    scripts={"lumina_train_network": "network", "lumina_train": "full"},
    defaults={"sample_sampler": "euler"},
    prompt={
        "width": 1024,
        "height": 1024,
        "sample_steps": 36,
        "scale": 3.5,
        "cfg_trunc_ratio": 0.25,
        "renorm_cfg": 1.0,
        "flow_shift": SHIFT,
    },
    refused=flow_options.REFUSED,
    idle=flow_options.IDLE,
    network_args=NetworkArgs,
    metadata=(*flow_options.METADATA, "gemma2_max_token_length", "system_prompt"),
    loads_in=LOADS_IN,
)
