"""Frozen layers that keep the codes in which their files have them: nothing is lost, and nothing is made wide."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from sfumato.formats import coded
from sfumato.formats.lazy import Lazy
from sfumato.memory.formats import storable
from sfumato.memory.quantise import Stored, store
from sfumato.models.key_formats import KeyFormat
from sfumato.tensors.blocks import KINDS, Blocks
from sfumato.tensors.stored import FP8, Format, Int8


def keep(tensors: Lazy, keys: KeyFormat, net: nn.Module) -> dict[str, Stored]:
    """Have layers of a net store their weights as its file does, without values yet: module path -> layer. What stands
    in formats that nothing is computed from is left to be made wide. A weight that something is merged into is
    quantised again to int8, the most exact: in the file's format what was merged might be lost."""
    found = {}
    for path, layer in net.named_modules():
        if not (isinstance(layer, Stored) or storable(layer)) or format_of(tensors, keys, f"{path}.weight") is None:
            continue
        if not isinstance(layer, Stored):
            layer = store(layer, Int8.of(cast(Tensor, layer.weight).shape))
        layer.hold(*stored(tensors, keys, f"{path}.weight", values=False))
        found[path] = layer
    return found


def put(
    tensors: Lazy, keys: KeyFormat, layers: Mapping[str, Stored], dtype: torch.dtype, read: Callable[[int], None]
) -> set[str]:
    """Give layers, by the names of their weights, the codes of the file where these are in the format that they are to
    be stored in: the names of these. `dtype`: what everything else sees; `read` is called with the size of each."""
    found = set()
    for name, layer in layers.items():
        format = format_of(tensors, keys, name)
        if format is not None and format.name == layer.format.name:
            format, parts = stored(tensors, keys, name)
            if isinstance(format, Int8) and isinstance(layer.format, Int8):
                format = replace(format, kernel=layer.format.kernel)
            layer.hold(format, parts)
            layer.dtype = dtype
            read(layer.shape.numel())
            found.add(name)
    return found


def quantise_rows(
    tensors: Lazy, keys: KeyFormat, layers: Mapping[str, Stored], dtype: torch.dtype | None, read: Callable[[int], None]
) -> set[str]:
    """Give layers their weights some rows at a time, so that none is in memory whole, where the file has them row for
    row: the names of these. Otherwise as `put`; `dtype` None: as in the file."""
    found = set()
    for name, layer in layers.items():
        sources, change = keys.pieces(name) or ((), None)
        rows = tensors.by_rows(sources[0]) if len(sources) == 1 and change is None else None
        if rows is not None and rows.shape == layer.shape:
            layer.put(rows, dtype)
            read(layer.shape.numel())
            found.add(name)
    return found


def format_of(tensors: Lazy, keys: KeyFormat, name: str) -> Format | None:
    """The format in which the file has a native weight; None: it is none that a layer can keep."""
    made_of = keys.pieces(name)
    formats = [_format(tensors, source) for source in made_of[0]] if made_of else [None]
    return formats[0] if all(format == formats[0] for format in formats) else None


def stored(tensors: Lazy, keys: KeyFormat, name: str, *, values: bool = True) -> tuple[Format, dict[str, Tensor]]:
    """The format of a native weight that has one, and what the file has of it; without `values`, on the meta device."""
    made_of, format = keys.pieces(name), format_of(tensors, keys, name)
    assert made_of is not None and format is not None
    sources, change = made_of
    pieces = [_parts(tensors, source, values=values) for source in sources]
    joined = format.join(pieces) if len(pieces) > 1 else pieces[0]  # joining copies
    return format, {part: change(t) if change else t for part, t in joined.items()}


def _format(tensors: Lazy, source: str) -> Format | None:
    """Of one of the file's tensors."""
    of, shape = tensors.form(source)
    if of is None or len(shape) not in (2, 4):
        return None
    columns = math.prod(shape[1:])
    if of.block:
        return Blocks(of.block) if of.block in KINDS and columns % of.unit == 0 else None
    if of.form.startswith("int8"):
        return Int8(of.group)
    _, scale = tensors.codes(source, values=False)
    scales = 0 if scale is None else scale.numel()
    return FP8(columns * shape[0] // scales if scales > shape[0] else 0)


def _parts(tensors: Lazy, source: str, *, values: bool) -> dict[str, Tensor]:
    codes, scale = tensors.codes(source, values=values)
    rows = tensors.form(source)[1][0]
    if scale is None:
        return {"codes": codes.view(rows, -1)}
    scale = coded.by_rows(scale, rows).contiguous()
    return {"codes": codes, "scale": scale if scale.shape[1] == 1 else scale[..., None]}


def widened(tensors: Lazy, *, kept: bool) -> str:
    """How many weights stand in which codes that no layer keeps; "": none do. `kept`: whether layers keep any."""
    forms = Counter(of.form for name, of in tensors.coded.items() if not (kept and _format(tensors, name)))
    return ", ".join(f"{count} weights are {form}" for form, count in forms.most_common())
