"""How the files of a family are recognised: by their metadata, names and shapes; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["checkpoint", "adapter", "vae", "text_encoder", "embedding", "controlnet"]
WHOLE = ("denoiser", "text_encoder", "vae")
PREFIX = "model.diffusion_model."
"""What stands before a denoiser's names in single files that hold more."""
NEVER = r"(?!)"
ADAPTER_TENSOR = (
    r".*\.((lora|hada|lokr)_\w+(\.\w+)*|lora\.(up|down)\.weight|oft_(blocks|diag|R)(\.\w+)*|diff|diff_b|dora_scale|alpha"
    r"|on_input|ia3_l)"
)
DOWN = r"\.(lora_down|lora_A|lora\.down)\.(default\.)?weight"
"""How a LoRA's first factor ends, which is as wide as the layer's input."""
CLAIMS = ("modelspec.architecture", "ss_base_model_version")
"""Metadata that name the model, as sfumato and kohya's scripts write them, the more exact one first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What a file is."""

    family: str
    kind: Kind
    variant: str = ""
    """Version within the family ("v1", "v2"); empty: the file does not say."""
    dialect: str = ""
    """How its tensors are named: "ldm", "diffusers", "openclip" ...; of adapters "kohya", "comfy" or "peft"."""
    prediction: Literal["eps", "v"] | None = None
    """What the denoiser predicts; None: the file does not say."""
    parts: tuple[str, ...] = ()
    """Of a checkpoint, what of `WHOLE` it holds."""
    refused: str = ""
    """Of a checkpoint that cannot be trained, what it is, as the end of a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """A file that holds one component alone, or an embedding."""

    kind: Kind
    dialect: str
    tensors: Mapping[str, tuple[int | None, ...] | None]
    """Pattern of a name -> the tensor's shape; None: any number, or any shape. All of them must be there."""
    variant: str = ""
    alone: bool = False
    """Whether the file holds nothing else."""

    def fits(self, shapes: Shapes) -> bool:
        """Whether all `tensors` are among these."""
        return (not self.alone or len(shapes) == len(self.tensors)) and all(
            any(_has(shape, wanted) and re.fullmatch(pattern, name) for name, shape in shapes.items())
            for pattern, wanted in self.tensors.items()
        )


def _has(shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> bool:
    return wanted is None or (
        len(shape) == len(wanted) and all(n in (None, m) for n, m in zip(wanted, shape, strict=True))
    )


def words(*keys: str, dialect: str = "comfy") -> Single:
    """An embedding with vectors for these text encoders, by ComfyUI's names."""
    return Single(kind="embedding", dialect=dialect, tensors=dict.fromkeys(keys, (None, None)), alone=True)


def vae(channels: int, prefix: str) -> tuple[Single, ...]:
    """A KL autoencoder of images, in LDM's and in diffusers' names; `prefix`: in single files, which it may lack."""
    latents = {"decoder.conv_in.weight": (None, channels, None, None)}
    blocks = {"ldm": "down.0.block.0", "diffusers": "down_blocks.0.resnets.0"}
    return _vae(prefix, {dialect: {**latents, f"encoder.{b}.conv1.weight": None} for dialect, b in blocks.items()})


def hunyuan_vae(prefix: str) -> tuple[Single, ...]:
    """The VAE of 64 channels, in the original names, which are ComfyUI's, and in diffusers'."""
    latents = {"decoder.conv_in.weight": (None, 64, None, None)}
    blocks = {"original": "down.0.downsample.conv", "diffusers": "down_blocks.0.conv1"}
    return _vae(prefix, {dialect: {**latents, f"encoder.{b}.weight": (None,) * 4} for dialect, b in blocks.items()})


def qwen_vae(prefix: str) -> tuple[Single, ...]:
    """The video VAE of 16 channels, in the original names, which are ComfyUI's, and in diffusers'."""
    halves = {
        "original": ("conv1", "downsamples.0.residual.2"),
        "diffusers": ("conv_in", "down_blocks.0.conv1"),
    }
    return _vae(
        prefix,
        {
            dialect: {f"decoder.{first}.weight": (None, 16, *(None,) * 3), f"encoder.{block}.weight": (None,) * 5}
            for dialect, (first, block) in halves.items()
        },
    )


def _vae(prefix: str, dialects: Mapping[str, Mapping[str, tuple[int | None, ...] | None]]) -> tuple[Single, ...]:
    """`dialects`: name -> tensors that are there; `prefix`: in single files, which it may lack."""
    below = f"({re.escape(prefix)})?"
    return tuple(
        Single(kind="vae", dialect=dialect, tensors={below + re.escape(name): s for name, s in tensors.items()})
        for dialect, tensors in dialects.items()
    )


def clip(width: int, variant: str = "") -> tuple[Single, ...]:
    """A CLIP text encoder, in OpenCLIP's and in transformers' names."""
    layers = {
        "openclip": r"(?!.*visual)(.*\.)?resblocks\.0\.attn\.in_proj_weight",
        "hf": r"(?!.*vision)(.*\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight",
    }
    return tuple(
        Single(kind="text_encoder", dialect=dialect, tensors={layer: (None, width)}, variant=variant)
        for dialect, layer in layers.items()
    )


LANGUAGE_MODELS = {
    "gemma2": "pre_feedforward_layernorm.weight",
    "qwen3": "self_attn.q_norm.weight",
    "qwen25vl": "self_attn.q_proj.bias",
}
"""Decoder-only language models -> a tensor of their layers that the others lack."""
_LLAMA_CPP = {"gemma2": "post_ffw_norm.weight", "qwen3": "attn_q_norm.weight", "qwen25vl": "attn_q.bias"}
"""The same in llama.cpp's names."""


def language_model(name: str, width: int, variant: str = "") -> tuple[Single, ...]:
    """One of `LANGUAGE_MODELS`, with states of this width, in transformers' and in llama.cpp's names."""
    layer = r"(?!.*visual)(.*\.)?layers\.0\."
    marks = {
        "hf": (rf"{layer}self_attn\.q_proj\.weight", layer + re.escape(LANGUAGE_MODELS[name])),
        "llama.cpp": (r"blk\.0\.attn_q\.weight", r"blk\.0\." + re.escape(_LLAMA_CPP[name])),
    }
    return _text_encoder(marks, width, variant)


def t5(width: int, variant: str = "") -> tuple[Single, ...]:
    """T5's encoder, or a whole T5, with states of this width, in transformers' and in llama.cpp's names."""
    layer = r"(?!.*decoder)(.*\.)?block\.0\.layer\.0\.SelfAttention\."
    marks = {
        "hf": (rf"{layer}q\.weight", rf"{layer}relative_attention_bias\.weight"),
        "llama.cpp": (r"enc\.blk\.0\.attn_q\.weight", r"enc\.blk\.0\.attn_rel_b\.weight"),
    }
    return _text_encoder(marks, width, variant)


def _text_encoder(marks: Mapping[str, tuple[str, str]], width: int, variant: str) -> tuple[Single, ...]:
    """`marks`: dialect -> patterns of a matrix of this width, and of another tensor."""
    return tuple(
        Single(kind="text_encoder", dialect=dialect, tensors={matrix: (None, width), mark: None}, variant=variant)
        for dialect, (matrix, mark) in marks.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """How a family's files are recognised."""

    family: str
    claims: Mapping[str, str]
    """How values of `CLAIMS` begin in files of this family, in small letters -> the variant that they name, or ""."""
    denoiser: Callable[[Shapes], Detected | None]
    """A checkpoint with these tensors, or a ControlNet."""
    adapters: Mapping[str, str]
    """Pattern of names that adapters of this family have, whether or not others have them as well -> dialect."""
    foreign: str = NEVER
    """Pattern of names that no adapter of this family has."""
    fits: Callable[[Shapes], bool] = lambda shapes: True
    """Whether the shapes of an adapter are such as this family's may have."""
    own: Callable[[Shapes], bool] = lambda shapes: True
    """Whether an adapter's names or shapes are this family's alone; not asked where its metadata name the family."""
    variant: Callable[[Shapes], str] = lambda shapes: ""
    """The variant that an adapter is for, by its names or shapes."""
    singles: Sequence[Single] = ()
    """The files of one component that this family answers for; the first that fits is taken."""

    def claim(self, metadata: Mapping[str, str], key: str) -> str | None:
        """The variant that this value of the metadata names; None: it does not name this family."""
        value = metadata.get(key, "").lower()
        return next((variant for start, variant in self.claims.items() if value.startswith(start)), None)

    def detect(self, shapes: Shapes, claim: str | None = None) -> Detected | None:
        """What a file with these tensors is, if it is of this family. `claim`: the variant that its metadata name."""
        if found := self.denoiser(shapes) or self._adapter(shapes, claim):
            return found
        # An adapter, or a bundle of another family, which may hold the same VAE.
        if has(shapes, ADAPTER_TENSOR) or any(name.startswith(PREFIX) for name in shapes):
            return None
        for single in self.singles:
            if single.fits(shapes):
                return Detected(family=self.family, kind=single.kind, dialect=single.dialect, variant=single.variant)
        return None

    def _adapter(self, shapes: Shapes, claim: str | None) -> Detected | None:
        if not has(shapes, ADAPTER_TENSOR) or has(shapes, self.foreign) or not self.fits(shapes):
            return None
        dialect = next((dialect for pattern, dialect in self.adapters.items() if has(shapes, pattern)), None)
        if dialect is None or (claim is None and not self.own(shapes)):
            return None
        variant = self.variant(shapes) or claim or ""
        return Detected(family=self.family, kind="adapter", dialect=dialect, variant=variant)


def has(shapes: Shapes, pattern: str) -> bool:
    """Whether the pattern matches a whole name."""
    compiled = re.compile(pattern)
    return any(compiled.fullmatch(name) for name in shapes)


def width(shapes: Shapes, pattern: str) -> int | None:
    """Columns of the first matrix whose whole name the pattern matches."""
    return next((shape[1] for name, shape in shapes.items() if len(shape) == 2 and re.fullmatch(pattern, name)), None)


def marked(
    shapes: Shapes, marks: Mapping[str, Sequence[str]], prefixes: Sequence[str] = (PREFIX, "")
) -> tuple[str, str] | None:
    """(dialect, prefix) of a denoiser, if all marks of a dialect are there. `marks`: dialect -> names of tensors."""
    return next(
        (
            (dialect, prefix)
            for dialect, names in marks.items()
            for prefix in prefixes
            if all(prefix + name in shapes for name in names)
        ),
        None,
    )


def parts(shapes: Shapes, *, text_encoder: str = "text_encoders.", vae: str = "first_stage_model.") -> tuple[str, ...]:
    """What of `WHOLE` a checkpoint with a denoiser holds, by what the names of the other two begin with."""
    starts = {"text_encoder": text_encoder, "vae": vae}
    return ("denoiser", *(part for part, start in starts.items() if any(name.startswith(start) for name in shapes)))
