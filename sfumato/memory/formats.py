"""Which layers of a net are kept in fewer bits, in which format, and what that spares and costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from sfumato.memory.quantise import Stored, store, stored_layers
from sfumato.tensors.stored import BLOCK, FP8, NF4, Format, Int8

LEAST, INPUTS = 1 << 10, 16
"""Numbers, and inputs, of the smallest layer that is worth it: scales take memory too."""
SENSITIVE = frozenset({"mod", "modulation", "adaln", "emb", "embed", "embedder", "norm"})
"""Words in the path of a layer that scales, shifts or gates all that passes its block: an error of its few outputs is
one of everything. Such layers get int8, the most exact of these formats: left wide, they would be up to a third of a
transformer's numbers, and most of its bytes."""


def formats(choice: str, path: str, shape: Sequence[int], kernel: str = "") -> tuple[Format, ...]:
    """The formats that the weight of a layer may get, the smallest first. `choice`: "fp8", "int8", "nf4" or "auto".
    `kernel`: as of `Int8`."""
    exact, inputs = Int8.of(shape, kernel), math.prod(shape[1:])
    if choice == "int8" or SENSITIVE & set(path.lower().replace("_", ".").split(".")):
        return (exact,)
    if choice == "fp8":
        return (FP8(),)
    four = (NF4(),) if inputs % BLOCK == 0 else ()
    return (*four, exact) if choice == "auto" else (four or (exact,))


def quantise(
    net: nn.Module, blocks: Iterable[nn.Module], choice: str, budget: float | None = None, kernel: str = ""
) -> dict[str, Stored]:
    """Have the frozen linear layers and convolutions of a net's blocks store their weights. What is outside of the
    blocks is the first and last of a net, and small; so are norms. Returns module path -> layer, also of those that
    were quantised before. `budget`: the relative error that "auto" allows a layer. `kernel`: as of `Int8`."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for path, layer in net.named_modules():
        if id(layer) in inside and storable(layer):
            weight = layer._parameters["weight"]
            assert weight is not None
            found = formats(choice, path, weight.shape, kernel)
            store(layer, *found, budget=budget if choice == "auto" else None)
    return stored_layers(net)


def storable(layer: nn.Module) -> bool:
    """Whether a layer is one that can keep its weight in fewer bits, with some use."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or isinstance(layer, Stored):
        return False
    weight, plain = layer.weight, not isinstance(layer, nn.Conv2d) or layer.padding_mode == "zeros"
    return plain and not weight.requires_grad and weight.numel() >= LEAST and weight[0].numel() >= INPUTS


def int8_kernel(device: torch.device) -> tuple[str, str]:
    """What multiplies in int8 there (`Int8.kernel`; "" for nothing), and that in words."""
    some = torch.zeros(32, 32, dtype=torch.int8, device=device)
    try:
        torch._int_mm(some, some.t())
    except (RuntimeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        return "", f"{device.type} does not multiply in int8 ({why}), so weights in it are made wide, which is exact"
    if device.type == "cuda" and find_spec("comfy_kitchen"):
        import comfy_kitchen

        backends = comfy_kitchen.list_backends().items()
        if any(
            each["available"] and "int8_linear" in each["capabilities"] for name, each in backends if name != "eager"
        ):
            return "comfy", "comfy-kitchen multiplies in int8, and torch in the backward pass"
    return "torch", "torch multiplies in int8 (torch._int_mm)"


@dataclass(frozen=True, slots=True)
class Held:
    """The layers of a net that are in one format."""

    format: str
    layers: int
    nbytes: int
    before: int
    """Bytes of the same weights as they would be computed with."""


def held(layers: Mapping[str, Stored], dtype: torch.dtype | None = None) -> list[Held]:
    """By format, the largest first; also of layers without values. `dtype`: what they would be computed with; None: it
    is known of layers with values."""
    rows: dict[str, Held] = {}
    for layer in layers.values():
        name, old = layer.format.name, rows.get(layer.format.name, Held(layer.format.name, 0, 0, 0))
        nbytes = sum(t.nbytes for t in layer.parts.values())
        before = layer.shape.numel() * (dtype or layer.dtype).itemsize
        rows[name] = Held(name, old.layers + 1, old.nbytes + nbytes, old.before + before)
    return sorted(rows.values(), key=lambda row: -row.nbytes)


def told(layers: Mapping[str, Stored]) -> str:
    """For the user, of layers with values: the formats, what they spare, and what was lost."""
    rows = held(layers)
    sizes = f"{sum(r.before for r in rows) / 2**20:,.0f} -> {sum(r.nbytes for r in rows) / 2**20:,.0f} MiB"
    line = f"{', '.join(f'{row.layers} layers in {row.format}' for row in rows)} ({sizes})"
    errors = {path: float(layer.error) for path, layer in layers.items() if layer.error is not None}
    if not errors:
        return line
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return f"{line}; relative error of a weight: {mean:.2%} in the mean, {errors[worst]:.2%} at most ({worst})"
