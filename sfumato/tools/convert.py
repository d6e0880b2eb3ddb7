"""Checkpoints from a single file to a diffusers folder and back, of any family, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.data.store import Progress
from sfumato.errors import UserError
from sfumato.families import detect
from sfumato.formats import files
from sfumato.formats.folders import irreplaceable
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.models.detection import ADAPTER_TENSOR, has
from sfumato.tools import adapter_file, checkpoints
from sfumato.tools.checkpoints import State
from sfumato.tools.written import ENDINGS, check_output, check_output_file

LAYOUTS = {"single": "single_file", "diffusers": "diffusers"}


def is_adapter(path: Path) -> bool:
    """Whether a file, or a folder of PEFT's, is an adapter, by names alone. Errors: `UserError` as `read_header`."""
    if path.is_dir():
        return any((path / name).is_file() for name in adapter_file.WEIGHTS)
    header = files.read_header(path)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    found = detect.identify(shapes, header.metadata)
    return found.kind == "adapter" if found else has(shapes, ADAPTER_TENSOR)


def convert(
    path: Path,
    out: Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    parts: Mapping[str, str] | None = None,
    tokenizer: str | None = None,
    bundle: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `path` (a single file or a diffusers folder) to `out`; what was done, as JSON-able facts.

    `to`: "single" or "diffusers"; None: by the ending of `out`. `dtype`: of `checkpoints.PRECISIONS`; None: as in the
    files (scaled fp8 stays so in a single file that keeps its names, and becomes bf16 else). `parts`: flag of a
    component -> a file of its own, put in place of what the model has; a single file then holds it too. `tokenizer`: a
    folder. `bundle`: whether a single file also holds the text encoders and the VAE. `metadata`: more of it.

    Errors: `UserError` for what is missing or contradicts; nothing is written then.
    """
    layout = layout_of(path, out, to)
    models = opened(path, layout, parts or {}, tokenizer, bundle=bundle)
    facts = write(models, checkpoints.stored(models), out, layout, dtype=dtype, metadata=metadata, progress=progress)
    return {"from": "diffusers" if path.is_dir() else "single_file", **facts}


def opened(
    path: Path, layout: str, parts: Mapping[str, str], tokenizer: str | None = None, *, bundle: bool = False
) -> Models:
    """A model without values, with all that the new layout needs of it. Errors: `UserError` for what is missing."""
    if layout == "diffusers":
        models = checkpoints.open_whole(path, parts, tokenizer)
        loading.check_folder(models)
        return models
    models = checkpoints.open_parts(path, parts)
    given = {c.name for c in models.family.components if c.flag in parts}
    if bundle or given:
        models.source = checkpoints.bundled(models.source, None if bundle else given)
    inside = {name: w for name, w in models.source.components.items() if w.prefix is not None}
    models.source = replace(models.source, components=inside)
    models.tokenizers = loading.tokenizers_found(models.family, models.source, tokenizer)
    return models


def write(
    models: Models,
    state: State,
    out: Path,
    layout: str,
    *,
    dtype: str | None,
    changed: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write an opened model with these tensors; what was done. `changed`: whether their values are others than its
    files'; `metadata`: more of it. Errors: `UserError`."""
    if layout == "diffusers" and dtype == "fp8_scaled":
        raise UserError("fp8_scaled: ComfyUI's form is one of single files; choose bf16 or fp8 for a folder")
    state, finish = checkpoints.precision(models, state, dtype, changed=changed)
    told = {**checkpoints.metadata(models, out), **(metadata or {})}
    loading.save(models, out, layout=layout, dtype=None, metadata=told, state=state, progress=progress, finish=finish)
    return {
        "family": models.family.name,
        "to": layout,
        "out": str(out),
        "parts": list(models.source.components),
        "tensors": sum(len(tensors) for tensors in state.values()),
        "dtype": dtype,
    }


def layout_of(path: Path, out: Path, to: str | None) -> str:
    """The layout of `out`, made of `path`. Errors: `UserError`, also where it must not be written."""
    file = out.suffix in ENDINGS
    to = to or ("single" if file else "diffusers")
    if to not in LAYOUTS:
        checkpoints.family_of(path)  # what is no checkpoint is said to be that
        raise UserError(f"--to {to}: {path} is a whole checkpoint, for which there are {' and '.join(LAYOUTS)}")
    if to == "diffusers" and file:
        raise UserError(f"{out}: --to diffusers writes a folder, and this is the name of a file")
    (check_output_file if to == "single" else check_output)(out, path)
    if out.resolve() in path.resolve().parents:
        raise UserError(f"{out}: holds what is read; choose another name for the result")
    if to == "diffusers" and (why := irreplaceable(out)):
        raise UserError(why)
    return LAYOUTS[to]
