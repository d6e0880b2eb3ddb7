"""What adapters make of single weights of a net: for merging where no net has values, one tensor after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sfumato.adapters import from_tensors
from sfumato.adapters.base import Adapter
from sfumato.errors import UserError
from sfumato.formats.dialect import AdapterTensors, ModulePath

Change = Callable[[Tensor], Tensor]
"""A weight in fp32 -> the same with all that is merged into it, in fp32; the given one may be overwritten."""
Strength = Callable[[ModulePath], float]
"""How strongly a layer's adapter is merged."""
SHOWN = 8


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
            out[component][f"{path}.{leaf}"] = partial(_merged, f"{component}.{path}", layer, tensors, leaf, scale)
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
                known[name] = partial(_both, known[name], change) if name in known else change
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


@torch.no_grad()
def _merged(name: str, layer: nn.Module, tensors: AdapterTensors, leaf: str, scale: float, weight: Tensor) -> Tensor:
    adapter = with_values(name, layer, tensors)
    delta = adapter.delta_weight(weight) if leaf == "weight" else adapter.delta_bias(weight)
    return weight if delta is None else weight.add_(delta, alpha=scale)


def _both(first: Change, second: Change, weight: Tensor) -> Tensor:
    return second(first(weight))
