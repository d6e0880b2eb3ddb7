"""Whole checkpoints for tools: opened without values, whatever they lack, and written one tensor after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato import __version__, families
from sfumato.errors import UserError
from sfumato.families import detect
from sfumato.formats import scaled_fp8
from sfumato.formats.coded import MARK, METADATA
from sfumato.formats.planned import Writable
from sfumato.models import loading, saving
from sfumato.models.base import Family, Models
from sfumato.models.components import Checkpoint

State = Mapping[str, Mapping[str, Writable]]
"""component -> its native tensors."""
PRECISIONS = {
    "fp32": torch.float32,
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_scaled": torch.float8_e4m3fn,
}
"""What a checkpoint can be written in. The last two are for the linear layers of the denoiser's blocks, and all else is
then in bf16: it loses more by fp8 than it is large."""


def family_of(path: Path) -> Family:
    """The family of a checkpoint, by its header. Errors: `UserError` for what is no checkpoint with a denoiser."""
    return families.family(detect.detect_file(path, "the model").family)


def open_whole(path: Path, given: Mapping[str, str], tokenizer: str | None = None) -> Models:
    """A whole model without values, as for training. `given`: component's flag -> its file. Errors: `UserError`."""
    family = family_of(path)
    options = families.facts(family.name).options(**_options(family, given))
    return loading.outline(family, str(path), options, vae=given.get("vae"), tokenizer=tokenizer)


def open_parts(path: Path, given: Mapping[str, str]) -> Models:
    """Those nets of a model that its file or folder, and the files given, hold, without values. Errors: `UserError`."""
    family = family_of(path)
    options = families.facts(family.name).options(**_options(family, given))
    return loading.outline_parts(family, str(path), options, given.get("vae"))


def _options(family: Family, given: Mapping[str, str]) -> dict[str, Any]:
    flags = {component.flag for component in family.components if component.flag}
    if strange := sorted(given.keys() - flags):
        raise UserError(
            *(f"--{flag}: {family.title} has no such part in a file of its own ({_listed(flags)})" for flag in strange)
        )
    return {flag: name for flag, name in given.items() if flag != "vae"}


def _listed(flags: Collection[str]) -> str:
    return ", ".join(f"--{flag}" for flag in sorted(flags)) or "it has none"


def stored(models: Models) -> State:
    """All tensors in the number formats of the files, fp8 too, each read when it is made; what stands in codes is
    fp32."""
    return {name: weights.stored() for name, weights in models.source.components.items()}


def bundled(source: Checkpoint, wanted: Collection[str] | None) -> Checkpoint:
    """The same, whose single file holds these components too (None: all), as ComfyUI's checkpoints do."""

    def placed(name: str) -> str | None:
        weights = source.components[name]
        named = next((prefix for prefix in weights.component.prefixes if prefix), weights.component.prefixes[0])
        inside = wanted is None or name in wanted
        return named if inside or weights.prefix == "" else weights.prefix

    return replace(source, components={n: replace(w, prefix=placed(n)) for n, w in source.components.items()})


def metadata(models: Models, path: Path) -> dict[str, str]:
    """The metadata of a file made of a checkpoint: its own, but for hashes, which are of its bytes."""
    left = ("format", METADATA)
    kept = {key: value for key, value in models.source.metadata.items() if "hash" not in key and key not in left}
    made = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": path.stem}
    if not loading.missing(models.family, models.source):  # else the version may not be known
        made["modelspec.architecture"] = families.facts(models.family.name).architecture(models.options)
    if getattr(models.options, "v_parameterization", False):
        made["modelspec.prediction_type"] = "v"
    return {**made, **kept, "modelspec.implementation": f"sfumato {__version__}"}


# --- number formats ---

Finish = Callable[[dict[str, Writable]], dict[str, Writable]]
"""What is left to be done to the tensors of a single file, by its names."""


def precision(models: Models, state: State, name: str | None, *, changed: bool = False) -> tuple[State, Finish]:
    """The state in a number format of `PRECISIONS` (None: as it is, what stands in codes as bf16, with scales where the
    files have them in fp8), and what is left to be done. `changed`: whether it has other values than the files."""
    if name is None:
        codes = {c: weights.coded() for c, weights in models.source.components.items()}
        state = {
            c: {n: t.to(torch.bfloat16) if n in codes.get(c, ()) else t for n, t in tensors.items()}
            for c, tensors in state.items()
        }
        return state, partial(_scaled_anew if changed else _scaled_again, models)
    narrow = block_layers(models) if name.startswith("fp8") else set[str]()
    other = torch.bfloat16 if narrow else PRECISIONS[name]

    def kept(component: str, tensor: str) -> torch.dtype:
        return PRECISIONS[name] if name == "fp8" and component == "denoiser" and tensor in narrow else other

    cast = {c: {n: as_float(t, kept(c, n)) for n, t in tensors.items()} for c, tensors in state.items()}
    return cast, partial(scaled, models, narrow) if name == "fp8_scaled" else lambda tensors: tensors


def scaled(models: Models, narrow: Collection[str], tensors: dict[str, Writable]) -> dict[str, Writable]:
    """The denoiser's tensors of these native names in fp8 with a scale, in a single file."""
    denoiser = models.source.components["denoiser"]
    fp8, other = (torch.empty(0, dtype=dtype, device="meta") for dtype in (torch.float8_e4m3fn, torch.float32))
    shapes = {n: (fp8 if n in narrow else other).new_empty(shape) for n, shape in denoiser.shapes().items()}
    written = saving.single_file(replace(models.source, passthrough={}), {"denoiser": shapes})
    names = [n for n, t in written.items() if t.dtype == fp8.dtype]
    return scaled_fp8.quantised(tensors, names, [f"{denoiser.prefix}{MARK}"])


def _scaled_again(models: Models, tensors: dict[str, Writable]) -> dict[str, Writable]:
    """A file's weights in scaled fp8, which were read as bf16, byte for byte with their scales, where they stand under
    the same names."""
    out = {**tensors}
    for weights in models.source.components.values():
        for name, (codes, _, scale) in weights.tensors.scales().items():
            own = f"{weights.prefix}{name}"
            if own in tensors and weights.tensors.coded[name].form == "fp8 scaled":
                out[own], out[own.removesuffix("weight") + scaled_fp8.SCALE] = codes, scale
                out[f"{weights.prefix}{MARK}"] = torch.zeros(2, dtype=codes.dtype)
    return out


def _scaled_anew(models: Models, tensors: dict[str, Writable]) -> dict[str, Writable]:
    """The same for weights that have changed: with one scale for each."""
    names: set[str] = set()
    marks = set()
    for weights in models.source.components.values():
        fp8 = [name for name, of in weights.tensors.coded.items() if of.form == "fp8 scaled"]
        if mine := {f"{weights.prefix}{name}" for name in fp8} & tensors.keys():
            names |= mine
            marks.add(f"{weights.prefix}{MARK}")
    return scaled_fp8.quantised(tensors, names, marks) if names else tensors


def as_float(tensor: Writable, dtype: torch.dtype) -> Writable:
    """A tensor in another number format, if it holds floats."""
    return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor


def block_layers(models: Models) -> set[str]:
    """Native names of the weights of linear layers in the denoiser's blocks."""
    inside = {id(m) for block in models.family.blocks(models.denoiser) for m in block.modules()}
    linear = {n: m for n, m in models.denoiser.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
    return {f"{name}.weight" for name in linear}
