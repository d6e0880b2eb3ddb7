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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `path` (a single file or a diffusers folder) to `out`; what was done, as JSON-able facts.

    `to`: "single" or "diffusers"; None: by the ending of `out`. `dtype`: of `checkpoints.PRECISIONS`; None: as in the
    files (weights in scaled fp8 as bf16). `parts`: flag of a component -> a file of its own, put in place of what the
    model has; a single file then holds it too. `tokenizer`: a folder. `bundle`: whether a single file also holds the
    text encoders and the VAE. Errors: `UserError` for what is missing or contradicts; nothing is written then.
    """
    parts, layout = dict(parts or {}), _layout(path, out, to)
    if layout == "diffusers":
        models = checkpoints.open_whole(path, parts, tokenizer)
        loading.check_folder(models)
    else:
        models = _for_single_file(path, parts, tokenizer, bundle=bundle)
    if layout == "diffusers" and dtype == "fp8_scaled":
        raise UserError("--dtype fp8_scaled: ComfyUI's form is one of single files; choose bf16 or fp8 for a folder")
    state, finish = checkpoints.precision(models, checkpoints.stored(models), dtype)
    metadata = checkpoints.metadata(models, out, models.source.metadata)
    loading.save(
        models, out, layout=layout, dtype=None, metadata=metadata, state=state, progress=progress, finish=finish
    )
    return {
        "family": models.family.name,
        "from": models.source.layout,
        "to": layout,
        "out": str(out),
        "parts": list(models.source.components),
        "tensors": sum(len(tensors) for tensors in state.values()),
        "dtype": dtype,
    }


def _layout(path: Path, out: Path, to: str | None) -> str:
    """The layout of `out`. Errors: `UserError`."""
    file = out.suffix in checkpoints.ENDINGS
    to = to or ("single" if file else "diffusers")
    if to not in LAYOUTS:
        raise UserError(f"--to {to}: {path} is a whole checkpoint, for which there are {' and '.join(LAYOUTS)}")
    if to == "single" and not file:
        raise UserError(f"{out}: a single file ends in {', '.join(checkpoints.ENDINGS)}")
    if to == "diffusers" and file:
        raise UserError(f"{out}: --to diffusers writes a folder, and this is the name of a file")
    if out.exists() and path.exists() and out.resolve() in (path.resolve(), *path.resolve().parents):
        raise UserError(f"{out}: is also read; choose another name for the result")
    if to == "single" and out.is_dir():
        raise UserError(f"{out}: a file is to be written here, and this is a folder")
    if to == "diffusers" and (why := irreplaceable(out)):
        raise UserError(why)
    return LAYOUTS[to]


def _for_single_file(path: Path, parts: Mapping[str, str], tokenizer: str | None, *, bundle: bool) -> Models:
    """The model with what goes into a single file, and the tokenizers that go beside it."""
    models = checkpoints.open_parts(path, parts)
    given = {c.name for c in models.family.components if c.flag in parts}
    if bundle or given:
        models.source = checkpoints.bundled(models.source, None if bundle else given)
    inside = {name: w for name, w in models.source.components.items() if w.prefix is not None}
    models.source = replace(models.source, components=inside)
    models.tokenizers = loading.tokenizers_found(models.family, models.source, tokenizer)
    return models
