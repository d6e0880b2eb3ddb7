"""Stable Diffusion 1.x and 2.x: options and how files are recognised; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sfumato.models.facts import LEAF, WHOLE, Detected, Facts, Kind, Shapes

FAMILY = "sd"
CONTEXT_XL = 2048
"""Width of the text states in Stable Diffusion XL, whose names are otherwise like these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run can be told about Stable Diffusion 1.x and 2.x."""

    v2: bool | None = None
    """The base model is Stable Diffusion 2.x; default: seen from the file."""
    v_parameterization: bool = False
    """The model predicts v instead of noise (Stable Diffusion 2.x at 768 px)."""
    clip_skip: int | None = None
    """Use the text encoder's n-th layer from the end; default 1 (the last)."""
    max_token_length: Literal[75, 150, 225] = 75
    """Tokens of a caption; longer ones are cut. 150 and 225 are encoded in chunks of 75."""
    weighted_captions: bool = False
    """Read `(word:1.3)` and `[word]` in captions as weights."""


def architecture(options: Options) -> str:
    """The model's name in modelspec metadata, without the ending for adapters."""
    if not options.v2:
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if options.v_parameterization else "stable-diffusion-v2-512"


def base_model_version(options: Options) -> str:
    """The model's name in sd-scripts' metadata, `ss_base_model_version`."""
    return ("sd_v2" if options.v2 else "sd_v1") + ("_v" if options.v_parameterization else "")


def detect(shapes: Shapes) -> Detected | None:
    """What a file with these tensors is, if it is of this family."""
    for look in (_checkpoint, _adapter, _controlnet, _vae, _text_encoder, _embedding):
        if found := look(shapes):
            return found
    return None


UNET_PREFIX = "model.diffusion_model."
_UNETS = {
    "ldm": (UNET_PREFIX, "input_blocks.0.0.weight", r"(input|middle|output)_block.*\.attn2\.to_k\.weight"),
    "native": ("", "input_blocks.0.0.weight", r"(input|middle|output)_block.*\.attn2\.to_k\.weight"),
    "diffusers": ("", "conv_in.weight", r"(down|mid|up)_block.*\.attn2\.to_k\.weight"),
}
"""Spelling -> prefix, first tensor, keys of the text attention."""


def _checkpoint(shapes: Shapes) -> Detected | None:
    for dialect, (prefix, first, keys) in _UNETS.items():
        width = text_width(shapes, re.escape(prefix) + keys)
        if (
            prefix + first in shapes
            and width not in (None, CONTEXT_XL)
            and not is_controlnet(shapes)
            and not is_larger(shapes)
        ):
            prefixes = (prefix, "cond_stage_model.", "first_stage_model.")
            parts = tuple(
                part
                for part, p in zip(WHOLE, prefixes, strict=True)
                if part == "denoiser" or any(n.startswith(p) for n in shapes)
            )
            return _said(
                "checkpoint", dialect, _variant(shapes), prediction="v" if "v_pred" in shapes else None, parts=parts
            )
    return None


_ADAPTERS = {
    "kohya": r"(lora_unet|lycoris)_"
    r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks|time_emb|conv_in|conv_out).*"
    r"|lora_te_text_model_encoder_layers_.*",
    "comfy": r"diffusion_model\.(input_blocks|middle_block|output_blocks)\..*|text_encoders\.clip_[lh]\..*",
    "peft": r"(unet\.)?(down_blocks|mid_block|up_blocks)\..*|text_encoder\.(text_model\.)?encoder\.layers\..*",
}
_LARGER = re.compile(
    r"lora_te[12]_.*|text_encoder_2\..*|text_encoders\.clip_g\..*|.*transformer_blocks[._][1-9]\d*[._].*"
    r"|.*(double|joint|single_transformer)_blocks.*"
)
"""What Stable Diffusion XL and the transformers have, whose names begin alike."""


def is_larger(shapes: Shapes) -> bool:
    """Whether there are names that no net of this family and no adapter for one has."""
    return any(_LARGER.fullmatch(name) for name in shapes)


def _adapter(shapes: Shapes) -> Detected | None:
    if not any(LEAF.fullmatch(name) for name in shapes) or is_larger(shapes):
        return None
    if text_width(shapes, r".*attn2[._]to_k\.(lora_down|lora_A|lora\.down)\.(default\.)?weight") == CONTEXT_XL:
        return None
    for dialect, pattern in _ADAPTERS.items():
        if any(re.fullmatch(pattern, name) for name in shapes):
            return _said("adapter", dialect, _variant(shapes))
    return None


def is_controlnet(shapes: Shapes) -> bool:
    """Whether these are a ControlNet's tensors, which otherwise are half a U-Net's."""
    marks = ("zero_convs.0.0.weight", "control_model.zero_convs.0.0.weight", "controlnet_cond_embedding.conv_in.weight")
    return any(mark in shapes for mark in marks)


def _controlnet(shapes: Shapes) -> Detected | None:
    if not is_controlnet(shapes) or text_width(shapes, r".*attn2\.to_k\.weight") == CONTEXT_XL:
        return None
    dialect = "diffusers" if "controlnet_cond_embedding.conv_in.weight" in shapes else "ldm"
    return _said("controlnet", dialect, _variant(shapes))


def _vae(shapes: Shapes) -> Detected | None:
    """The VAE of Stable Diffusion XL has the same names and shapes; one of more channels is another family's."""
    if any(name.startswith((UNET_PREFIX, "conditioner.")) for name in shapes):
        return None
    for dialect, prefix, block in (
        ("ldm", "", "down.0.block.0"),
        ("ldm", "first_stage_model.", "down.0.block.0"),
        ("diffusers", "", "down_blocks.0.resnets.0"),
    ):
        if (
            f"{prefix}encoder.{block}.conv1.weight" in shapes
            and shapes.get(f"{prefix}decoder.conv_in.weight", (0, 0))[1] == 4
        ):
            return _said("vae", dialect)
    return None


def _text_encoder(shapes: Shapes) -> Detected | None:
    """CLIP-L, which other families use as well, or OpenCLIP-H."""
    widths = {"": 0} | {
        name: shape[-1]
        for name, shape in shapes.items()
        if name.endswith(("token_embedding.weight", "positional_embedding"))
    }
    if any(".resblocks." in name for name in shapes) and max(widths.values()) == 1024:
        return _said("text_encoder", "openclip", "v2")
    if any(re.fullmatch(r"(.*\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight", name) for name in shapes) and max(
        widths.values()
    ) in (
        768,
        1024,
    ):
        return _said("text_encoder", "hf", "v1" if max(widths.values()) == 768 else "v2")
    return None


def _embedding(shapes: Shapes) -> Detected | None:
    name = next((n for n in shapes if n == "emb_params" or n.startswith("string_to_param.")), None)
    if name is None or len(shapes[name]) != 2 or shapes[name][1] not in (768, 1024):
        return None
    return _said("embedding", "kohya" if name == "emb_params" else "a1111", "v1" if shapes[name][1] == 768 else "v2")


def _said(
    kind: Kind,
    dialect: str,
    variant: str = "",
    prediction: Literal["eps", "v"] | None = None,
    parts: tuple[str, ...] = (),
) -> Detected:
    return Detected(family=FAMILY, kind=kind, dialect=dialect, variant=variant, prediction=prediction, parts=parts)


def text_width(shapes: Shapes, pattern: str) -> int | None:
    """Width of the text states, from the keys of an attention to the text."""
    return next((shape[1] for name, shape in shapes.items() if len(shape) == 2 and re.fullmatch(pattern, name)), None)


def _variant(shapes: Shapes) -> str:
    """2.x projects into its transformers by linear layers, 1.x by convolutions."""
    pattern = re.compile(r".*[._]proj_in\.((lora_down|lora_A|lora\.down)\.(default\.)?)?weight")
    shape = next((shape for name, shape in shapes.items() if pattern.fullmatch(name)), None)
    return "" if shape is None else "v2" if len(shape) == 2 else "v1"


FACTS = Facts(
    options=Options,
    detect=detect,
    architecture=architecture,
    base_model_version=base_model_version,
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    denoiser_folder="unet",
    needed=("denoiser", "text_encoder"),
    scripts={"train_network": "network", "fine_tune": "full", "train_db": "full"},
    trains_text=("train_db",),
)
