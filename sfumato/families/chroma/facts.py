"""Chroma: options and how files are recognised; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sfumato.errors import UserError
from sfumato.families.flux import network_args
from sfumato.families.flux.facts import PREFIX, VAE
from sfumato.models import flow_options
from sfumato.models.facts import WHOLE, Detected, Facts, Idle, Shapes
from sfumato.models.flow_options import FlowOptions

FAMILY = "chroma"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(FlowOptions):
    """What a run can be told about Chroma."""

    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"] = "sigmoid"
    """How noise levels are drawn. sigma: by weighting_scheme, then shifted; uniform: evenly; sigmoid: the sigmoid of a
    normal number; shift: the same, then shifted; flux_shift: the same, shifted the more the larger the image is."""
    discrete_flow_shift: float | None = None
    """Shift of timestep_sampling sigma and shift, above 1 towards more noise; default 3.1582."""
    clip_l: str | None = None
    """CLIP-L, where the base model's file does not hold it: file, folder or hub id. Chroma has none."""
    t5xxl: str | None = None
    """T5-XXL, where the base model's file does not hold it: file, folder or hub id."""
    t5xxl_max_token_length: int = 512
    """T5's tokens of a caption; longer ones are cut."""
    apply_t5_attn_mask: bool = True
    """Hide T5's padding; for Chroma, which sees one token of it, always on."""
    guidance_scale: float = 0.0
    """The guidance that the model is told while training; Chroma is told none, so it is always 0."""
    model_type: Literal["chroma"] | None = None
    """kohya's name of the family, which is seen from the file anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Options):
    """The options, with what the file says."""

    double_blocks: int
    single_blocks: int


def check(options: Options) -> list[str]:
    """For `Facts.check`."""
    wrong = flow_options.check(options)
    if options.guidance_scale != 0:
        wrong.append(
            f"guidance_scale: Chroma takes no guidance, so 0 was expected, found {options.guidance_scale:g}; leave it "
            "out "
            "(images are guided by the scale of their prompts, --l)"
        )
    if not options.apply_t5_attn_mask:
        wrong.append(
            "apply_t5_attn_mask: Chroma was trained with T5's padding hidden and is always told so; leave it out"
        )
    if options.t5xxl_max_token_length < 1:
        wrong.append(f"t5xxl_max_token_length: expected 1 or more, found {options.t5xxl_max_token_length}")
    return wrong


# --- network_args ---

_MOD_DIMS = ("img_mod_dim", "txt_mod_dim", "single_mod_dim")
_NO_INPUTS = ("time_in", "vector_in", "guidance_in")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkArgs(network_args.NetworkArgs):
    """Those of FLUX.1; ranks for layers that Chroma does not have can only be 0."""

    def __post_init__(self) -> None:
        if wrong := [*network_args.mistakes(self), *self._of_no_layer()]:
            raise UserError(*(f"network_args {message}" for message in wrong))

    def _of_no_layer(self) -> list[str]:
        ranks = {name: getattr(self, name) for name in _MOD_DIMS}
        wrong = [
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
_ADAPTERS = {"kohya": f"lora_unet_{MARK}_", "comfy": f"diffusion_model.{MARK}.", "peft": f"transformer.{MARK}."}


def detect(shapes: Shapes) -> Detected | None:
    """What a file with these tensors is, if it is of this family.

    An adapter's names are FLUX.1's as well, which answers for it, unless it reaches into the net that is Chroma's own.
    """
    for dialect, start in _ADAPTERS.items():
        if any(name.startswith(start) for name in shapes):
            return Detected(family=FAMILY, kind="adapter", dialect=dialect)
    for prefix in (PREFIX, ""):
        if f"{prefix}{MARK}.in_proj.weight" in shapes:
            dialect = "diffusers" if f"{prefix}x_embedder.weight" in shapes else "bfl"
            prefixes = (prefix, "text_encoders.", VAE)
            parts = tuple(
                part
                for part, p in zip(WHOLE, prefixes, strict=True)
                if part == "denoiser" or any(name.startswith(p) for name in shapes)
            )
            return Detected(family=FAMILY, kind="checkpoint", dialect=dialect, parts=parts)
    return None


FACTS = Facts(
    options=Options,
    detect=detect,
    architecture=lambda options: "chroma",
    base_model_version=lambda options: "chroma",
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    scripts={"flux_train_network": "network", "flux_train": "full"},
    defaults={"sample_sampler": "euler"},
    prompt={"width": 1024, "height": 1024, "sample_steps": 35, "scale": 5.0},
    paths=("clip_l", "t5xxl"),
    refused=flow_options.REFUSED,
    idle=(
        *flow_options.IDLE,
        Idle(("clip_l",), lambda options: True, "Chroma has no CLIP; T5 alone reads its captions"),
    ),
    check=check,
    network_args=NetworkArgs,
    metadata=(*flow_options.METADATA, "guidance_scale", "apply_t5_attn_mask", "t5xxl_max_token_length", "model_type"),
)
