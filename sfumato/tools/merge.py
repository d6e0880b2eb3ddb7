"""Adapters merged into a checkpoint or a diffusers folder, one tensor after another; all else is copied as it is."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from sfumato import __version__, families
from sfumato.adapters import from_tensors
from sfumato.adapters.merging import Change, Strength, changes, in_order, one_thread
from sfumato.data.store import Progress
from sfumato.errors import UserError
from sfumato.families.detect import detect_file, identify
from sfumato.formats import files, gguf
from sfumato.formats.adapter_check import check_adapter
from sfumato.formats.coded import METADATA
from sfumato.formats.dialect import AdapterTensors, ModulePath
from sfumato.formats.folders import aside_folder, irreplaceable
from sfumato.formats.lazy import Lazy
from sfumato.formats.names import add_prefix
from sfumato.formats.planned import Writable
from sfumato.models import locate
from sfumato.models.base import Models
from sfumato.models.components import ComponentWeights
from sfumato.models.embedding_files import named_in
from sfumato.models.loading import merge_when_read, outline_parts
from sfumato.models.merged import merged
from sfumato.tools.merge_adapters import strengths_of
from sfumato.tools.written import ENDINGS, check_output, check_output_file
from sfumato.train.provenance import now
from sfumato.train.trainables import read_adapter

_WEIGHTS = (*ENDINGS, ".msgpack", ".h5", ".onnx", ".gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Merging:
    """What is merged into which files, and how the result is written."""

    model: Path
    """A single file or a diffusers folder."""
    adapters: Sequence[tuple[Path, float]]
    """Files and their ratios, in this order."""
    out: Path
    options: Mapping[str, str] = field(default_factory=dict)
    """Files of text encoders, by the family's flags for them."""
    outs: Mapping[str, Path] = field(default_factory=dict)
    """Where these are written, by component; else beside `out`, as NAME_COMPONENT."""
    only: Collection[str] = ()
    """The components that are changed; empty: all that the adapters have layers for."""
    block_weights: Sequence[Sequence[float]] = ()
    """Layer-wise weights, one list for each adapter, or one for all."""
    dtype: torch.dtype | None = None
    """Number format of the result; None: each tensor's own."""
    metadata: bool = True
    """Whether the result says what it was made of."""


@one_thread()
def merge(what: Merging, progress: Progress | None = None) -> dict[str, Any]:
    """Write the merged model. Everything is checked before anything is written.

    Returns JSON-able facts: `out`; `beside`, further files; `adapters`: of each {path, ratio, layers of each
    component, kinds}; `words`: those beside an adapter, which no model holds. Errors: `UserError` for adapters that are
    damaged, of another model, or do not fit; for results that would be written over what is read.
    """
    facts = families.facts(detect_file(what.model, "model").family)
    family = families.family(facts.signature.family)
    models = outline_parts(family, str(what.model), facts.options(**what.options))
    _check_outputs(what, models)
    read = [(path, ratio, _layers(models, path, what.only)) for path, ratio in what.adapters]
    strengths = strengths_of(family, [ratio for _, ratio in what.adapters], what.block_weights)
    each = zip(read, strengths, strict=True)
    found = in_order(*(_changes(models, path, state, strength) for (path, _, state), strength in each))
    merge_when_read(models, found)
    metadata = _metadata(what, models)
    if models.source.layout == "diffusers":
        _write_folder(what, models, metadata, progress)
    else:
        _write_single(what, models, metadata, progress)
    beside = _write_parts(what, models, metadata, progress)
    return {
        "out": str(what.out),
        "beside": [str(path) for path in beside],
        "adapters": [{"path": str(path), "ratio": ratio, **_counts(state)} for path, ratio, state in read],
        "words": {str(path): words for path, _, _ in read if (words := named_in(path))},
    }


# --- what is merged ---


def _layers(models: Models, path: Path, only: Collection[str]) -> dict[ModulePath, AdapterTensors]:
    """An adapter's tensors by layer. Errors: `UserError`, also for components that the model does not hold."""
    absent = {c.name: c.flag for c in models.family.components if c.name not in (*models.nets(), "vae")}
    starts = {name: tuple(d.prefix[name] for d in models.dialects.values() if d.prefix.get(name)) for name in absent}
    header = files.read_header(path)
    left_out = tuple(prefix for prefixes in starts.values() for prefix in prefixes)
    check_adapter(files.load(path), f"adapter {path}")
    try:
        state = read_adapter(models, path, "adapter", skip=lambda key: key.startswith(left_out) if left_out else False)
    except UserError as error:
        found = identify({name: info.shape for name, info in header.tensors.items()}, header.metadata)
        if found and found.kind == "adapter" and found.family != models.family.name:
            other = families.family(found.family).title
            looks = f"{path} looks like an adapter of {other}, and the model is {models.family.title}"
            raise UserError(*error.messages, looks) from error
        raise
    for name, prefixes in starts.items():
        count = sum(key.startswith(prefixes) for key in header.tensors)
        if count and not only:
            cure = f"give its file with --{absent[name]}, or " if absent[name] else ""
            raise UserError(
                f"{path}: {count} of its {len(header.tensors)} tensors are for {name}, which the model does not hold: "
                f"{cure}leave it as it is with --only {' '.join(models.nets())}"
            )
    if unknown := sorted(set(only) - set(models.nets())):
        raise UserError(f"--only {' '.join(unknown)}: the model holds {', '.join(models.nets())}")
    return {layer: tensors for layer, tensors in state.items() if not only or layer[0] in only}


def _changes(
    models: Models, path: Path, state: Mapping[ModulePath, AdapterTensors], strength: Strength
) -> dict[str, dict[str, Change]]:
    """Errors: `UserError` for tensors that do not fit their layers, with the file's name."""
    try:
        return changes(models.nets(), state, strength)
    except UserError as error:
        raise UserError(*(f"{path}: {message}" for message in error.messages)) from None


def _counts(state: Mapping[ModulePath, AdapterTensors]) -> dict[str, Any]:
    return {
        "layers": dict(Counter(component for component, _ in state)),
        "kinds": dict(Counter(from_tensors(tensors)[0].__name__ for tensors in state.values())),
    }


# --- what is written ---


def _check_outputs(what: Merging, models: Models) -> None:
    """Errors: `UserError` for results that would be written over what is read, or in no folder."""
    inputs = [what.model, *(path for path, _ in what.adapters), *map(Path, what.options.values())]
    folder = models.source.layout == "diffusers"
    for out in (what.out, *(_beside(what, name) for name in _parts(models))):
        (check_output if folder and out == what.out else check_output_file)(out, *inputs)
    if folder and (why := irreplaceable(what.out)):
        raise UserError(why)
    if folder and what.model.resolve() in what.out.resolve().parents:
        raise UserError(f"{what.out}: is within the model's folder; choose another")


def _parts(models: Models) -> dict[str, ComponentWeights]:
    """The components that came in files of their own."""
    return {name: w for name, w in models.source.components.items() if w.alone and name != "vae"}


def _beside(what: Merging, name: str) -> Path:
    suffix = what.out.suffix if what.out.suffix in ENDINGS else ".safetensors"
    return what.outs.get(name, what.out.with_name(f"{what.out.stem}_{name}{suffix}"))


def _file(paths: Iterable[Path], changed: Mapping[str, Writable], dtype: torch.dtype | None) -> dict[str, Writable]:
    """All tensors of some files, with what is changed in its place, and all floats in `dtype`."""
    lazy = Lazy.of(paths)
    return {
        name: changed[name] if name in changed else t.to(dtype)
        for name, t in lazy.raw().items()
        if dtype is None or name in lazy  # what scales others is of no use then
    }


def _write_single(what: Merging, models: Models, metadata: Mapping[str, str], progress: Progress | None) -> None:
    changed: dict[str, Writable] = {}
    for weights in models.source.components.values():
        if not weights.alone and (weights.changes or what.dtype):
            changed |= add_prefix(merged(weights, what.dtype), weights.prefix or "")
    tensors = _file([models.source.path], changed, what.dtype)
    if models.source.components["denoiser"].changes:
        tensors = models.family.adjust_single_file(models, tensors)
    _save(what, what.out, tensors, changed, metadata, models.source.check, progress)


def _write_parts(what: Merging, models: Models, metadata: Mapping[str, str], progress: Progress | None) -> list[Path]:
    """The files of their own of components that are changed, written beside the model."""
    written = []
    for name, weights in _parts(models).items():
        if not weights.changes:
            continue
        paths = weights.tensors.paths
        if any(gguf.is_gguf(path) for path in paths):  # whose names of text encoders no other file has
            changed = weights.component.single(weights.shapes()).write(weights.planned(what.dtype))
            tensors = {**changed, **weights.carried()}
        else:
            changed = add_prefix(merged(weights, what.dtype), _prefix(weights))
            tensors = _file(paths, changed, what.dtype)
        _save(what, _beside(what, name), tensors, changed, metadata, weights.tensors.check, progress)
        written.append(_beside(what, name))
    return written


def _prefix(weights: ComponentWeights) -> str:
    """What stands before a component's names in the files that it was read from."""
    name, (_, theirs) = next(iter(weights.tensors.places.items()))
    return theirs.removesuffix(name)


def _write_folder(what: Merging, models: Models, metadata: Mapping[str, str], progress: Progress | None) -> None:
    """The folder with all that is in it; weights of changed components in the files that they came in."""
    source = models.source.path
    rewritten: dict[Path, dict[str, Writable]] = {}
    for weights in models.source.components.values():
        if not weights.alone and (weights.changes or what.dtype):
            changed = merged(weights, what.dtype)
            rewritten |= dict.fromkeys(weights.tensors.paths, changed)
    with aside_folder(what.out) as folder:
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.resolve() in rewritten:
                changed = rewritten[path.resolve()]
                marked = {**files.read_header(path).metadata, **metadata, "format": "pt"}
                tensors = _file([path], changed, what.dtype)
                _save(what, target, tensors, {n: t for n, t in changed.items() if n in tensors}, marked, None, progress)
            elif not _superseded(path, rewritten):
                shutil.copyfile(path, target)
        for index in folder.rglob("*.index*.json"):
            _measure(index)
        models.source.check()


def _superseded(path: Path, rewritten: Mapping[Path, Any]) -> bool:
    """Whether a file holds weights beside rewritten ones, such as the same in another number format."""
    return path.suffix in _WEIGHTS and any(path.resolve().parent == other.parent for other in rewritten)


def _measure(index: Path) -> None:
    """The list of shards says how large they are; one of shards that are not there is left out."""
    content = locate.read_json(index)
    shards = [index.parent / name for name in set(content.get("weight_map", {}).values())]
    if not all(shard.is_file() for shard in shards):
        index.unlink()
    elif isinstance(content.get("metadata"), dict):
        headers = [files.read_header(shard) for shard in shards]
        size = sum(t.end - t.start for h in headers for t in h.tensors.values())
        if content["metadata"].get("total_size") != size:
            content["metadata"]["total_size"] = size
            files.write_text(index, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _save(
    what: Merging,
    path: Path,
    tensors: Mapping[str, Writable],
    changed: Mapping[str, Writable],
    metadata: Mapping[str, str],
    check: Callable[[], None] | None,
    progress: Progress | None,
) -> None:
    """Write a file; what is changed is checked as it is made."""
    checked = files.finite({n: tensors[n] for n in changed if n in tensors}, f"{path.name}", what.dtype)
    files.save(path, {**tensors, **checked}, metadata, check, progress)


def _metadata(what: Merging, models: Models) -> dict[str, str]:
    """That of the model, with what was merged into it; without hashes, which are those of other values."""
    old = models.source.metadata
    left = ("modelspec.hash_sha256", *([METADATA] if what.dtype else []))
    kept = {k: v for k, v in old.items() if not k.startswith("sshs_") and k not in left}
    if not what.metadata:
        return kept
    new = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": old.get("modelspec.architecture")
        or families.facts(models.family.name).architecture(models.options),
        "modelspec.implementation": old.get("modelspec.implementation") or f"sfumato {__version__}",
        "modelspec.title": what.out.stem,
        "modelspec.date": datetime.fromtimestamp(now()).replace(microsecond=0).isoformat(),
        "modelspec.merged_from": ", ".join(map(title, (what.model, *(path for path, _ in what.adapters)))),
    }
    return kept | new


def title(path: Path) -> str:
    """What a file calls itself, else its name."""
    if path.is_dir():
        return path.name
    return files.read_header(path).metadata.get("modelspec.title") or path.stem
