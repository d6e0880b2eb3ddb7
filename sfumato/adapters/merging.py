"""What adapters make of single weights of a net: for merging where no net has values, one tensor after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sfumato.adapters import from_tensors
from sfumato.adapters.base import Adapter
from sfumato.errors import UserError
from sfumato.formats.dialect import AdapterTensors, ModulePath

Strength = Callable[[ModulePath], float]
"""How strongly a layer's adapter is merged."""
Factors = tuple[Tensor, Tensor]
"""(out, r) and (r, in * kernel), fp32."""
SHOWN = 8
BLOCK = 1 << 18
"""Numbers that are changed at once: in fp32 they and their factors stay in a core's cache (1 MB)."""


@dataclass(frozen=True, slots=True)
class Change:
    """All that is merged into one tensor."""

    whole: Callable[[Tensor], Tensor]
    """The tensor in fp32 -> the changed one in fp32; the given one may be overwritten."""
    factors: Callable[[], Factors | None] = lambda: None
    """Those of a product, if `whole` does nothing but add it."""

    @torch.no_grad()
    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The changed tensor in a number format, rounded once; the given one may be overwritten."""
        factors = self.factors()
        return self.whole(tensor.float()).to(dtype) if factors is None else _plus_product(tensor, *factors, dtype)

    def then(self, other: Change) -> Change:
        """Both, one after the other."""
        return Change(
            lambda tensor: other.whole(self.whole(tensor)), partial(_side_by_side, self.factors, other.factors)
        )


def changes(
    nets: Mapping[str, nn.Module], state: Mapping[ModulePath, AdapterTensors], strength: Strength
) -> dict[str, dict[str, Change]]:
    """component -> tensor of its net -> what merging makes of it.

    `nets`: by component, on the meta device; `state`: a file's tensors, which are read when a change is made. Errors:
    one `UserError` for tensors that do not fit their layers.
    """
    out: dict[str, dict[str, Change]] = {component: {} for component in nets}
    wrong: list[str] = []
    for (component, path), tensors in state.items():
        layer, scale = nets[component].get_submodule(path), strength((component, path))
        try:
            adapter = _adapter(f"{component}.{path}", layer, tensors)
        except UserError as error:
            wrong += error.messages
            continue
        if not scale:
            continue
        changed = ["weight"]
        if layer.bias is not None and type(adapter).delta_bias is not Adapter.delta_bias:
            changed.append("bias")
        for leaf in changed:
            given = (f"{component}.{path}", layer, tensors)
            change = Change(partial(_merged, *given, leaf, scale))
            if leaf == "weight" and type(adapter).low_rank is not Adapter.low_rank:
                change = replace(change, factors=partial(_factors, *given, scale))
            out[component][f"{path}.{leaf}"] = change
    if wrong:
        raise UserError(*sorted(wrong)[:SHOWN])
    return out


def in_order(*each: Mapping[str, Mapping[str, Change]]) -> dict[str, dict[str, Change]]:
    """The changes of several files, made one after the other."""
    out: dict[str, dict[str, Change]] = {}
    for changed in each:
        for component, by_name in changed.items():
            known = out.setdefault(component, {})
            for name, change in by_name.items():
                known[name] = known[name].then(change) if name in known else change
    return out


def with_values(name: str, layer: nn.Module, tensors: AdapterTensors) -> Adapter:
    """The adapter of a layer that may itself be without values, with a file's; for what it does to weights. `name`: for
    messages. Errors: `UserError` for tensors of no kind, or that do not fit the layer."""
    adapter = _adapter(name, layer, tensors)
    adapter._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)  # type: ignore[no-untyped-call]
    adapter.load_tensors(tensors)
    return adapter.eval()


def _adapter(name: str, layer: nn.Module, tensors: AdapterTensors) -> Adapter:
    """The adapter as its layer has it; of a layer without values, shapes alone."""
    kind, options = from_tensors(tensors)
    adapter = kind(layer, options, torch.Generator())
    adapter.name = name
    adapter.load_tensors(tensors)
    return adapter


def _merged(name: str, layer: nn.Module, tensors: AdapterTensors, leaf: str, scale: float, weight: Tensor) -> Tensor:
    adapter = with_values(name, layer, tensors)
    delta = adapter.delta_weight(weight) if leaf == "weight" else adapter.delta_bias(weight)
    return weight if delta is None else weight.add_(delta, alpha=scale)


def _factors(name: str, layer: nn.Module, tensors: AdapterTensors, scale: float) -> Factors | None:
    found = with_values(name, layer, tensors).low_rank()
    return found and (found[0] * scale, found[1])


def _side_by_side(one: Callable[[], Factors | None], other: Callable[[], Factors | None]) -> Factors | None:
    """The factors of the sum of two products."""
    first, second = one(), other()
    return first and second and (torch.cat((first[0], second[0]), 1), torch.cat((first[1], second[1])))


def _plus_product(weight: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """weight + up @ down in fp32, then in `dtype`: some rows at a time, in the cache of one core."""
    out = weight if weight.dtype == dtype and weight.is_contiguous() else torch.empty(weight.shape, dtype=dtype)
    rows = max(1, BLOCK // down.shape[1])
    buffer = torch.empty(min(rows, len(up)), down.shape[1])
    with one_thread():
        for start in range(0, len(up), rows):
            left = up[start : start + rows]
            block = buffer[: len(left)].view(-1, *weight.shape[1:])
            block.copy_(weight[start : start + rows])
            block.flatten(1).addmm_(left, down)
            out[start : start + rows] = block
    return out


@contextmanager
def one_thread() -> Iterator[None]:
    """Small steps take longer when several threads wait for each other at each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
