"""Whether two files have the same effect: adapters by what they add to each layer, checkpoints tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.adapters.base import Adapter
from sfumato.data.store import Progress
from sfumato.errors import UserError
from sfumato.families import detect
from sfumato.formats import files
from sfumato.formats.dialect import ALPHA, DOWN, UP, AdapterTensors, ModulePath
from sfumato.formats.planned import Writable, made
from sfumato.models import locate
from sfumato.tools import adapter_file
from sfumato.tools.adapter_file import AdapterFile

EXACT = 2e-6
"""A difference up to this is what fp32 makes of another order of summation."""
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float8_e4m3fn: 0.1}
"""Number format -> what rounding a layer's factors to it may make of its change, as a share of that."""


class Difference(NamedTuple):
    """Of one layer, or one tensor of a checkpoint."""

    layer: str
    relative: float
    """Frobenius norm of the difference, as a share of the larger of the two."""
    largest: float
    """The largest difference of two numbers."""
    why: str = ""
    """What is wrong with it, beyond other numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a comparison found."""

    same: bool
    verdict: str
    compared: int
    """Layers, or tensors of checkpoints."""
    differences: tuple[Difference, ...]
    """Those that are not exact, the largest first."""

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"differences": [d._asdict() for d in self.differences]}


def verify(
    one: str | Path,
    other: str | Path,
    *,
    family: str | None = None,
    model: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Verified:
    """Compare two adapters, or two checkpoints, in whatever names.

    `family`: of the adapters' model, where a file does not show it. `model`: the checkpoint that they are for; kinds
    that act on a layer's own weight are compared by their parameters without it, which tells apart what is of one form
    alone. Errors: `UserError` for files that cannot be compared.
    """
    if _is_model(one) and _is_model(other):
        return _checkpoints(Path(one), Path(other), progress)
    first, second, wrong = _both(one, other, family, model)
    weights = adapter_file.weights(model) if model else {}
    paths = list(dict.fromkeys([*first.state, *second.state]))
    found = []
    for i, path in enumerate(paths):
        progress(i, len(paths))
        pair = first.state.get(path), second.state.get(path)
        weight = weights.get(path)
        found.append(_layer(path, *pair, first.outline.layers[path], made(weight) if weight else None))
    tensors = [t for file in (first, second) for each in (*file.state.values(), file.words) for t in each.values()]
    return _judged([*found, *_words(first, second), *wrong], tensors)


def _judged(found: list[Difference], tensors: list[Tensor]) -> Verified:
    coarsest = max((ROUNDING.get(t.dtype, EXACT) for t in tensors), default=EXACT)
    same = all(d.relative <= coarsest and not d.why for d in found)
    inexact = sorted((d for d in found if not d.relative <= EXACT or d.why), key=lambda d: (-bool(d.why), -d.relative))
    names = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype in ROUNDING})
    verdict = "exact" if not inexact else f"exact up to {' and '.join(names)}" if same else "not the same"
    return Verified(same=same, verdict=verdict, compared=len(found), differences=tuple(inexact))


# --- adapters ---


def _both(
    one: str | Path, other: str | Path, family: str | None, model: str | None
) -> tuple[AdapterFile, AdapterFile, list[Difference]]:
    """Both files, read as adapters of one model. Keys of either that name no layer are differences, not errors."""
    try:
        first = adapter_file.read(one, family=family, model=model)
    except UserError as error:
        try:
            second = adapter_file.read(other, family=family, model=model)
            first, wrong = adapter_file.read_like(one, second.outline)
        except UserError as another:
            raise UserError(*dict.fromkeys([*error.messages, *another.messages])) from None
        if not first.state:
            raise error from None
        return first, second, _strange(wrong)
    second, wrong = adapter_file.read_like(other, first.outline)
    return first, second, _strange(wrong)


def _strange(names: list[str]) -> list[Difference]:
    return [Difference(name, 1.0, float("nan"), "names no layer") for name in names]


def _words(one: AdapterFile, other: AdapterFile) -> list[Difference]:
    """Of the words beside two adapters."""
    return [
        _tensor(key, one.words.get(key), other.words.get(key), (one.path, other.path))
        for key in dict.fromkeys([*one.words, *other.words])
    ]


def _layer(
    path: ModulePath,
    one: AdapterTensors | None,
    other: AdapterTensors | None,
    shape: tuple[int, ...],
    weight: Tensor | None,
) -> Difference:
    """The difference of two adapters of a layer, one of which may be missing."""
    name = ".".join(path)
    if one and other and _equal(one, other):
        return Difference(name, 0.0, 0.0)
    if one and other and (near := _factors(name, one, other, shape)):
        return near
    base = torch.zeros(shape) if weight is None else weight.float()
    try:
        a, b = (adapter_file.adapter_of(path, tensors, base) if tensors else None for tensors in (one, other))
    except UserError as error:
        return Difference(name, 1.0, float("nan"), "; ".join(error.messages))
    if weight is None and any(each and each.needs_weight() for each in (a, b)):
        return _parameters(name, a, b)
    return _difference(name, *_alike(*(None if each is None else _change(each, base) for each in (a, b))))


def _factors(name: str, one: AdapterTensors, other: AdapterTensors, shape: tuple[int, ...]) -> Difference | None:
    """Of two plain LoRAs, by their factors alone, where they are equal up to rounding: their difference is a LoRA too,
    and its norms need matrices of the ranks alone. None: anything else, which is compared number by number."""
    if any(tensors.keys() != {DOWN, UP, ALPHA} for tensors in (one, other)):
        return None
    if any(t[UP].flatten(1).shape[0] != shape[0] or t[DOWN].shape[1:] != shape[1:] for t in (one, other)):
        return None
    downs = [t[DOWN].double().flatten(1) for t in (one, other)]
    ups = [t[UP].double().flatten(1) * (float(t[ALPHA]) / len(t[DOWN])) for t in (one, other)]
    if any(up.shape[1] != len(down) for up, down in zip(ups, downs, strict=True)):
        return None
    norm = max(_norm(up, down) for up, down in zip(ups, downs, strict=True))
    apart = _norm(torch.cat([ups[0], -ups[1]], 1), torch.cat(downs))
    relative = apart / norm if norm else 0.0
    return Difference(name, relative, apart) if relative <= EXACT else None


def _norm(up: Tensor, down: Tensor) -> float:
    """Frobenius norm of a product of factors in fp64, which is that of their triangles: good to 1e-15 of the
    factors'."""
    left, right = torch.linalg.qr(up).R, torch.linalg.qr(down.T).R
    return float(torch.linalg.matrix_norm(left @ right.T))


def _change(adapter: Adapter, weight: Tensor) -> Tensor:
    """What it adds to the layer's weight and bias, in a row."""
    bias = adapter.delta_bias(torch.zeros(len(weight)))
    change = adapter.delta_weight(weight).flatten()
    return change if bias is None else torch.cat([change, bias.flatten()])


def _alike(one: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both of one length: what is missing adds nothing."""
    both = [torch.zeros(0) if t is None else t for t in (one, other)]
    length = max(map(len, both))
    first, second = (torch.nn.functional.pad(t, (0, length - len(t))) for t in both)
    return first, second


def _parameters(name: str, one: Adapter | None, other: Adapter | None) -> Difference:
    """By their own tensors: the same numbers have the same effect, others may have as well."""
    if one is None or other is None or type(one) is not type(other):
        what = " and ".join(type(a).__name__ if a else "nothing" for a in (one, other))
        return Difference(name, 1.0, float("nan"), f"{what} cannot be compared without the model; give it with --model")
    a, b = one.state_dict(), other.state_dict()
    if a.keys() != b.keys() or any(t.shape != b[k].shape for k, t in a.items()):
        return Difference(name, 1.0, float("nan"), "of another form; give the model with --model")
    return max((_difference(name, t, b[k]) for k, t in a.items()), key=lambda d: d.relative)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.shape == other[k].shape and torch.equal(t.float(), other[k].float()) for k, t in one.items()
    )


def _tensor(name: str, one: Writable | None, other: Writable | None, paths: tuple[Path, Path]) -> Difference:
    """The difference of two tensors of files, one of which may be missing."""
    if one is None or other is None:
        return Difference(name, 1.0, float("nan"), f"only in {paths[one is None]}")
    if one.shape != other.shape:
        return Difference(name, 1.0, float("nan"), f"{list(one.shape)} and {list(other.shape)}")
    return _difference(name, made(one), made(other))


def _difference(name: str, one: Tensor, other: Tensor) -> Difference:
    one, other = one.float(), other.float()
    norm = max(float(one.norm()), float(other.norm()))
    apart = one - other
    largest = float(apart.abs().max()) if apart.numel() else 0.0
    return Difference(name, float(apart.norm()) / norm if norm else 0.0, largest)


# --- checkpoints ---


def _is_model(path: str | Path) -> bool:
    path = Path(path).expanduser()
    if path.is_dir():
        return locate.index_of(path) is not None
    header = files.read_header(path)
    found = detect.identify({name: info.shape for name, info in header.tensors.items()}, header.metadata)
    return found is not None and found.kind == "checkpoint"


def _checkpoints(one: Path, other: Path, progress: Progress) -> Verified:
    """Tensor by tensor, in native names, two of them in memory at a time."""
    (_, first), (_, second) = (adapter_file.open_checkpoint(path, str(path)) for path in (one, other))
    found, dtypes = [], []
    total = sum(len(weights.tensors) for weights in first.components.values())
    for part in dict.fromkeys([*first.components, *second.components]):
        if part not in first.components or part not in second.components:
            found.append(Difference(part, 1.0, float("nan"), f"only in {one if part in first.components else other}"))
            continue
        a, b = (source.components[part].planned(coded=torch.float32) for source in (first, second))
        for name in dict.fromkeys([*a, *b]):
            progress(len(found), total)
            full = f"{part}.{name}"
            found.append(_tensor(full, a.get(name), b.get(name), (one, other)))
            dtypes += [torch.empty(0, dtype=t[name].dtype) for t in (a, b) if name in t]
    return _judged(found, dtypes)
