"""Which layers of a net are kept in fewer bits, in which format, and what that spares and costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sfumato.memory.quantise import Stored, store, stored_layers
from sfumato.tensors.stored import BLOCK, FP8, NF4, Format, Int8

LEAST, INPUTS = 1 << 10, 16
"""Numbers, and inputs, of the smallest layer that is worth it: scales take memory too."""
SENSITIVE = frozenset({"mod", "modulation", "adaln", "emb", "embed", "embedder", "norm"})
"""Words in the path of a layer that scales, shifts or gates all that passes its block: an error of its few outputs is
one of everything. Such layers get int8, the most exact of these formats: left wide, they would be up to a third of a
transformer's numbers, and most of its bytes."""


def formats(choice: str, path: str, shape: Sequence[int]) -> tuple[Format, ...]:
    """The formats that the weight of a layer may get, the smallest first. `choice`: "fp8", "int8", "nf4" or "auto"."""
    exact, inputs = Int8.of(shape), math.prod(shape[1:])
    if choice == "int8" or SENSITIVE & set(path.lower().replace("_", ".").split(".")):
        return (exact,)
    if choice == "fp8":
        return (FP8(),)
    four = (NF4(),) if inputs % BLOCK == 0 else ()
    return (*four, exact) if choice == "auto" else (four or (exact,))


def quantise(
    net: nn.Module, blocks: Iterable[nn.Module], choice: str, budget: float | None = None
) -> dict[str, Stored]:
    """Have the frozen linear layers and convolutions of a net's blocks store their weights. What is outside of the
    blocks is the first and last of a net, and small; so are norms. Returns module path -> layer, also of those that
    were quantised before. `budget`: the relative error that "auto" allows a layer."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for path, layer in net.named_modules():
        if id(layer) in inside and _storable(layer):
            weight = layer._parameters["weight"]
            assert weight is not None
            found = formats(choice, path, weight.shape)
            store(layer, *found, budget=budget if choice == "auto" else None)
    return stored_layers(net)


def _storable(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Linear | nn.Conv2d) or isinstance(layer, Stored):
        return False
    weight, plain = layer.weight, not isinstance(layer, nn.Conv2d) or layer.padding_mode == "zeros"
    return plain and not weight.requires_grad and weight.numel() >= LEAST and weight[0].numel() >= INPUTS


@dataclass(frozen=True, slots=True)
class Held:
    """The layers of a net that are in one format."""

    format: str
    layers: int
    nbytes: int
    before: int
    """Bytes of the same weights as they would be computed with."""


def held(layers: Mapping[str, Stored]) -> list[Held]:
    """By format, the largest first; also of layers without values."""
    rows: dict[str, Held] = {}
    for layer in layers.values():
        name, old = layer.format.name, rows.get(layer.format.name, Held(layer.format.name, 0, 0, 0))
        nbytes = sum(t.nbytes for t in layer.parts.values())
        before = layer.shape.numel() * layer.dtype.itemsize
        rows[name] = Held(name, old.layers + 1, old.nbytes + nbytes, old.before + before)
    return sorted(rows.values(), key=lambda row: -row.nbytes)


def told(layers: Mapping[str, Stored]) -> str:
    """For the user: the formats, what they spare, and the errors of layers with values."""
    rows = held(layers)
    sizes = f"{sum(r.before for r in rows) / 2**30:.2f} -> {sum(r.nbytes for r in rows) / 2**30:.2f} GiB"
    line = f"{', '.join(f'{row.layers} layers in {row.format}' for row in rows)} ({sizes})"
    errors = {path: float(layer.error) for path, layer in layers.items() if layer.error is not None}
    if not errors:
        return line
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return f"{line}; relative error of a weight: mean {mean:.2%}, most {errors[worst]:.2%} ({worst})"
