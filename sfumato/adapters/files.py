"""The tensors of an adapter file, in the names of any dialect.

A dialect builds the name of every layer of a net, and names are looked up: one whose dots became `_` is never split.
What a fused layer's tensors are in pieces, and the reverse, each kind of adapter knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.adapters.base import Adapter
from sfumato.adapters.find import from_tensors
from sfumato.errors import UserError, nearest
from sfumato.formats.dialect import ALPHA, DOWN, READ_AS, UP, AdapterTensors, Dialect, ModulePath
from sfumato.formats.names import Change, Rule
from sfumato.formats.spellings import Spellings

_T = TypeVar("_T")


def write(dialect: Dialect, adapters: Mapping[ModulePath, AdapterTensors]) -> dict[str, Tensor]:
    """Adapters in a dialect's names. Errors: `UserError` for what the dialect cannot hold; two layers of one name."""
    out: dict[str, Tensor] = {}
    for path, tensors in adapters.items():
        names, rule = dialect.names(path)
        if dialect.fold_alpha:
            tensors = _folded(names[0], tensors)
        for name, piece in zip(names, _cut(names, rule, tensors), strict=True):
            keys = {f"{name}.{dialect.tensor_names.get(leaf, leaf)}": t for leaf, t in piece.items()}
            if twice := out.keys() & keys.keys():
                raise UserError(f"two layers share the {dialect.name} name {min(twice)!r}")
            out |= keys
    return out


Inexact = Callable[[ModulePath, Mapping[int, AdapterTensors], Rule], AdapterTensors]
"""(layer, the tensors of its pieces, the rule that cuts it) -> tensors of the whole that are near to them."""


def read(
    dialects: Iterable[Dialect],
    tensors: Mapping[str, Tensor],
    paths: Iterable[ModulePath],
    inexact: Inexact | None = None,
) -> dict[ModulePath, AdapterTensors]:
    """Tensors of an adapter file -> native tensors, in the order of `paths` (all layers of the nets, not only adapted
    ones).

    Keys of several dialects may stand in one file. A LoRA without alpha gets its rank as alpha. `inexact`: for fused
    layers that have no exact form from their pieces; None: they are refused. Errors: `UserError` listing the keys that
    name no layer, with the nearest names.
    """
    return read_as(Spellings(dialects, paths), tensors, inexact)


def read_as(
    spellings: Spellings, tensors: Mapping[str, Tensor], inexact: Inexact | None = None
) -> dict[ModulePath, AdapterTensors]:
    """`read`, for several files of one model."""
    found: dict[ModulePath, tuple[Rule | None, dict[int, AdapterTensors]]] = {}
    strange = []
    for key, named in spellings.claimed(tensors):
        if named is None:
            strange.append(key)
            continue
        (layer, leaf), tensor = named, tensors[key]
        rule, pieces = found.setdefault(layer.path, (layer.rule, {}))
        piece = pieces.setdefault(layer.piece, {})
        native = READ_AS.get(leaf, leaf)
        if native in piece or rule != layer.rule:
            raise UserError(f"two tensors for one place of {layer.path[1]}, the second of them {key!r}")
        if (native in (DOWN, UP) and (tensor.ndim < 2 or not tensor.numel())) or (
            native == ALPHA and tensor.numel() != 1
        ):
            expected = "one number" if native == ALPHA else "rows and columns"
            raise UserError(f"{key!r} of the adapter has the shape {list(tensor.shape)}, expected {expected}")
        # PEFT's magnitudes are (out,), or (1, out, 1, 1) of a convolution.
        piece[native] = tensor.reshape(-1, *[1] * max(1, tensor.ndim - 1)) if "magnitude" in leaf else tensor
    if strange:
        raise UserError(_unclaimed(strange, list(spellings.known()), len(tensors)))
    return {path: _joined(path, *found[path], inexact) for path in spellings.paths if path in found}


def kind_of(tensors: Mapping[str, Tensor]) -> type[Adapter] | None:
    """The kind of a file's first layer, in any dialect; None: it is no adapter."""
    name = next(iter(tensors), "")
    while name := name.rpartition(".")[0]:
        leaves = {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{name}.")}
        with suppress(UserError):
            return from_tensors({READ_AS.get(leaf, leaf): t for leaf, t in leaves.items()})[0]
    return None


def _unclaimed(strange: list[str], known: list[str], total: int) -> str:
    """The message for keys that name no layer: a key of each of the first five unknown names, and the nearest known
    ones."""
    first: dict[str, str] = {}
    for key in strange:
        first.setdefault(key.split(".lora_")[0] if ".lora_" in key else key.rpartition(".")[0], key)
    shown = [f"  {key}{nearest(head, known)}" for head, key in list(first.items())[:5]]
    more = [f"  and those of {len(first) - 5} more names"] if len(first) > 5 else []
    return "\n".join([f"{len(strange)} of {total} keys of the adapter name no layer of this model:", *shown, *more])


# --- values ---


def _exact(name: str, change: Callable[[type[Adapter]], _T], tensors: AdapterTensors) -> _T:
    """`change` by the kind of these tensors; `name` begins the messages."""
    try:
        return change(from_tensors(tensors)[0])
    except UserError as error:
        raise UserError(*(f"{name}: {message}" for message in error.messages)) from None


def _own_form(tensors: AdapterTensors) -> AdapterTensors:
    try:
        kind, _ = from_tensors(tensors)
    except UserError:
        return tensors  # refused when an adapter is made of them
    return kind.own_form(tensors)


def _folded(name: str, tensors: AdapterTensors) -> AdapterTensors:
    """The tensors without alpha, with its effect."""
    return _exact(name, lambda kind: kind.fold_alpha(tensors), tensors)


def _cut(names: tuple[str, ...], rule: Rule | None, tensors: AdapterTensors) -> list[AdapterTensors]:
    """The tensors of each piece of a fused layer."""
    if rule and rule.change:
        tensors = _moved(names[0], rule.change, rule.change.back, tensors)
    if len(names) == 1:
        return [tensors]

    def pieces(kind: type[Adapter]) -> list[AdapterTensors]:
        whole = kind.row_count(tensors)
        rows = (rule.rows if rule else None) or (whole // len(names),) * len(names)
        if whole and sum(rows) != whole:  # 0: it does not act on rows
            raise UserError(f"{whole} rows of a fused layer are not {len(rows)} pieces of {', '.join(map(str, rows))}")
        return kind.cut(tensors, rows)

    return _exact(names[0], pieces, tensors)


def _moved(name: str, change: Change, move: Callable[[Tensor], Tensor], tensors: AdapterTensors) -> AdapterTensors:
    """The tensors of a layer whose weight goes through `move`: exact for some kinds if that is a matter of rows."""
    if not change.moves_rows:
        raise UserError(f"{name}: the layer's values differ between the two sides; its adapter has no exact form there")
    return _exact(name, lambda kind: kind.move_rows(tensors, move), tensors)


def _joined(
    path: ModulePath, rule: Rule | None, pieces: dict[int, AdapterTensors], inexact: Inexact | None
) -> AdapterTensors:
    """The native tensors of a layer from those of its pieces; a piece that is not there changes nothing."""
    for tensors in pieces.values():
        if DOWN in tensors and ALPHA not in tensors:  # scale 1
            tensors[ALPHA] = torch.tensor(float(tensors[DOWN].shape[0]), dtype=tensors[DOWN].dtype)
    pieces = {i: _own_form(piece) for i, piece in pieces.items()}
    if rule is None or len(rule.foreign) == 1:
        whole = pieces[0]
    else:
        first = pieces[min(pieces)]

        def join(kind: type[Adapter]) -> AdapterTensors:
            return kind.join(pieces, rule.rows or (kind.row_count(first),) * len(rule.foreign))

        try:
            whole = _exact(path[1], join, first)
        except UserError:
            if inexact is None:
                raise
            whole = inexact(path, pieces, rule)
    return _moved(path[1], rule.change, rule.change.into, whole) if rule and rule.change else whole
