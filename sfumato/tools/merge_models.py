"""Checkpoints of one family added with weights, in whatever layouts and names, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.data.store import Progress
from sfumato.errors import UserError
from sfumato.formats.planned import PlannedTensor, Writable, made
from sfumato.models.base import Models
from sfumato.tools import checkpoints, convert
from sfumato.tools.checkpoints import State
from sfumato.tools.written import check_device

SHOWN = 5


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """One of the models."""

    path: Path
    ratio: float
    models: Models
    state: State


def merge_checkpoints(
    paths: Sequence[Path],
    out: Path,
    ratios: Sequence[float] | None = None,
    *,
    precision: str = "fp32",
    save_precision: str | None = None,
    only: Collection[str] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the sum of ratio x weight over some checkpoints; what was done, as JSON-able facts.

    The layout is that of `out`, by its ending; names, metadata, and tensors of no net are the first one's. `ratios`:
    None: equal, of sum 1. A tensor that some lack is summed over those that have it, by ratios raised to the same sum.
    `precision`: what is computed in, of `checkpoints.PRECISIONS`; `save_precision`: likewise; None: as the first has
    it (fp8, scaled fp8 too). `only`: components that are merged; the others are the first one's.
    Errors: `UserError` for models of several families or kinds, for tensors of other shapes, and as `convert`.
    """
    ratios = list(ratios) if ratios is not None else [1 / len(paths)] * len(paths)
    if len(paths) < 2 or len(ratios) != len(paths):
        raise UserError(f"--ratios: {len(ratios)} for {len(paths)} models; give two models or more, and one for each")
    check_device(device)
    layout = {convert.layout_of(path, out, None) for path in paths}.pop()
    opened = [convert.opened(paths[0], layout, {}), *(checkpoints.open_parts(path, {}) for path in paths[1:])]
    sources = [
        _Source(path, ratio, models, checkpoints.stored(models))
        for path, ratio, models in zip(paths, ratios, opened, strict=True)
    ]
    _check(sources)
    if layout == "single_file":
        _take_parts(opened[0], opened[1:])
    state, lacking = _merged(sources, only, checkpoints.PRECISIONS[precision], device)
    merged = ", ".join(path.name for path in paths)
    facts = convert.write(
        opened[0],
        state,
        out,
        layout,
        dtype=save_precision,
        changed=True,
        metadata={"modelspec.merged_from": merged},
        progress=progress,
    )
    return {**facts, "models": {str(s.path): s.ratio for s in sources}, "lacking": lacking}


def _check(sources: Sequence[_Source]) -> None:
    """Errors: `UserError` for models that cannot be added."""
    first = sources[0]
    for other in sources[1:]:
        ours, theirs = first.models.family, other.models.family
        if ours is not theirs:
            raise UserError(f"{first.path} is of {ours.title}, {other.path} of {theirs.title}: they cannot be merged")
        v = [getattr(s.models.options, "v_parameterization", False) for s in (first, other)]
        if v[0] != v[1]:
            says = ["v", "noise"] if v[0] else ["noise", "v"]
            raise UserError(f"{first.path} predicts {says[0]}, {other.path} {says[1]}: they cannot be merged")
    wrong = [
        f"{component}: tensor {name!r} has shape {list(t.shape)} in {first.path}, {list(shape)} in {other.path}"
        for other in sources[1:]
        for component, tensors in first.state.items()
        for name, t in tensors.items()
        if name in other.state.get(component, {})
        and (shape := other.state[component][name].shape)
        and tuple(shape) != tuple(t.shape)
    ]
    if wrong:
        raise UserError(*wrong[:SHOWN], *([f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []))


def _take_parts(models: Models, others: Sequence[Models]) -> None:
    """Give a model the components that it lacks, as others have them in a single file."""
    parts = dict(models.source.components)
    for other in others:
        parts = {**{n: w for n, w in other.source.components.items() if w.prefix is not None}, **parts}
    models.source = replace(models.source, components=parts)


def _merged(
    sources: Sequence[_Source], only: Collection[str] | None, precision: torch.dtype, device: str
) -> tuple[State, dict[str, list[str]]]:
    """The sums, of all components that the first model has now; and "component.tensor" -> the files that lack it."""
    lacking: dict[str, list[str]] = {}
    state: dict[str, Mapping[str, Writable]] = {}
    for component in sources[0].models.source.components:
        if only is not None and component not in only and component in sources[0].state:
            state[component] = sources[0].state[component]
            continue
        names = dict.fromkeys(name for s in sources for name in s.state.get(component, {}))
        state[component] = merged = dict[str, Writable]()
        for name in names:
            having = [s for s in sources if name in s.state.get(component, {})]
            if len(having) < len(sources):
                lacking[f"{component}.{name}"] = [str(s.path) for s in sources if s not in having]
            tensor = having[0].state[component][name]
            merged[name] = tensor
            if tensor.dtype.is_floating_point and (len(having) > 1 or _raised(having, sources) != [1.0]):
                terms = [(s.state[component][name], r) for s, r in zip(having, _raised(having, sources), strict=True)]
                make = partial(_sum, terms, precision, device, tensor.dtype)
                merged[name] = PlannedTensor(tensor.dtype, tuple(tensor.shape), make)
    return state, lacking


def _raised(having: Sequence[_Source], sources: Sequence[_Source]) -> list[float]:
    """The ratios of these models, of the same sum as all."""
    if len(having) == len(sources):
        return [s.ratio for s in having]
    share, whole = sum(s.ratio for s in having), sum(s.ratio for s in sources)
    return [s.ratio * whole / share if share else whole / len(having) for s in having]


def _sum(terms: Sequence[tuple[Writable, float]], precision: torch.dtype, device: str, dtype: torch.dtype) -> Tensor:
    """Ratio x tensor, added up in a precision, in a number format."""
    total: Tensor | None = None
    for tensor, ratio in terms:
        values = made(tensor).to(device, precision) * ratio
        total = values if total is None else total.add_(values)
    assert total is not None
    return total.to("cpu", dtype)
