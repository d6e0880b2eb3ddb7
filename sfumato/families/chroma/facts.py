"""Chroma: options and how files are recognised; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from sfumato.config.rules import Count, Must, Only, Weights
from sfumato.families.chroma.clients import LOADS_IN
from sfumato.families.flux import network_args
from sfumato.families.flux.facts import ADAPTERS, FOREIGN, VAE, ControlOptions
from sfumato.models import flow_options
from sfumato.models.detection import Detected, Shapes, Signature, has, marked, parts, words
from sfumato.models.facts import Facts
from sfumato.models.flow_options import Sampling, Shift

FAMILY = "chroma"

_NO_CLIP = Only(why="Chroma has no CLIP; T5 alone reads its captions")
_NO_GUIDANCE = Must(
    lambda guidance: guidance == 0,
    "0, as Chroma takes no guidance (images are guided by the scale of their prompts, --l)",
)
_MASKED = Must(bool, "true, as Chroma was trained with T5's padding hidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(ControlOptions):
    """Settings of Chroma alone."""

    family = FAMILY
    timestep_sampling: Sampling = "sigmoid"
    discrete_flow_shift: Shift = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default 3.1582."""
    clip_l: Annotated[Weights, _NO_CLIP] = None
    """CLIP-L, where the base model's file does not hold it: file, folder or hub id. Chroma has none."""
    t5xxl: Weights = None
    """T5-XXL, where the base model's file does not hold it: file, folder or hub id."""
    t5xxl_max_token_length: Count = 512
    """T5's tokens of a caption; longer ones are cut."""
    apply_t5_attn_mask: Annotated[bool, _MASKED] = True
    """Hide T5's padding; for Chroma, which sees one token of it, always on."""
    guidance_scale: Annotated[float, _NO_GUIDANCE] = 0.0
    """The guidance that the model is given while training; Chroma takes none, so it is always 0."""
    model_type: Literal["chroma"] | None = None
    """kohya's name of the family, which is seen from the file anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Options):
    """The options, with what the file says."""

    double_blocks: int
    single_blocks: int


# --- network_args ---

_MOD_DIMS = ("img_mod_dim", "txt_mod_dim", "single_mod_dim")
_NO_INPUTS = ("time_in", "vector_in", "guidance_in")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkArgs(network_args.NetworkArgs):
    """Those of FLUX.1; ranks for layers that Chroma does not have can only be 0."""

    def contradictions(self) -> list[str]:
        """See `Arguments.contradictions`."""
        ranks = {name: getattr(self, name) for name in _MOD_DIMS}
        wrong = network_args.NetworkArgs.contradictions(self) + [
            f"{name}={rank}: Chroma makes its modulations outside of the blocks; leave it out"
            for name, rank in ranks.items()
            if rank
        ]
        inputs = re.findall(r"\d+", self.in_dims or "")
        if len(inputs) == len(network_args.INPUTS) and any(
            int(inputs[network_args.INPUTS.index(name)]) for name in _NO_INPUTS
        ):
            wrong.append(
                f"in_dims={self.in_dims}: Chroma has no {', '.join(_NO_INPUTS)}; their ranks must be 0, as in "
                "[4,0,0,0,4]"
            )
        return wrong


# --- files ---

MARK = "distilled_guidance_layer"
"""The net that makes all modulations, which no other model has."""
_MARKS = {"diffusers": (f"{MARK}.in_proj.weight", "x_embedder.weight"), "bfl": (f"{MARK}.in_proj.weight",)}
_CONTROL = {"bfl": ("pos_embed_input.weight", "img_in.weight", "double_blocks.0.img_attn.qkv.weight")}

_MODULATED = r".*([._]mod[._]lin|modulation|(time|vector|guidance)_in|norm1?(_context)?\.linear|text_embed).*"
"""Layers that FLUX.1 alone has: those that make modulations within the blocks, and those that take their input."""


def _denoiser(shapes: Shapes) -> Detected | None:
    if (found := marked(shapes, _MARKS)) is None:
        control = marked(shapes, _CONTROL) if not has(shapes, _MODULATED) else None
        return Detected(family=FAMILY, kind="controlnet", dialect=control[0]) if control else None
    return Detected(family=FAMILY, kind="checkpoint", dialect=found[0], parts=parts(shapes, vae=VAE))


SIGNATURE = Signature(
    family=FAMILY,
    claims={"chroma": ""},
    denoiser=_denoiser,
    adapters={
        rf"lora_unet_{MARK}_.*|lora_te1_encoder_block_.*": "kohya",
        rf"diffusion_model\.{MARK}\..*": "comfy",
        rf"transformer\.{MARK}\..*": "peft",
        **ADAPTERS,
    },
    foreign=rf"{FOREIGN}|{_MODULATED}",
    # All other names are FLUX.1's as well, which answers for an adapter that does not say whose it is.
    own=lambda shapes: has(shapes, rf".*{MARK}.*|lora_te1_encoder_block_.*"),
    singles=(words("t5xxl"),),
)


FACTS = Facts(
    options=Options,
    signature=SIGNATURE,
    architecture=lambda options: "chroma",
    base_model_version=lambda options: "chroma",
    swaps_pairs=True,
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    scripts={"flux_train_network": "network", "flux_train": "full", "flux_train_control_net": "controlnet"},
    defaults={"sample_sampler": "euler"},
    prompt={"width": 1024, "height": 1024, "sample_steps": 35, "scale": 5.0},
    refused=flow_options.REFUSED,
    idle=flow_options.IDLE,
    network_args=NetworkArgs,
    metadata=(*flow_options.METADATA, "guidance_scale", "apply_t5_attn_mask", "t5xxl_max_token_length", "model_type"),
    loads_in=LOADS_IN,
)
