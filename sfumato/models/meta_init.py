"""Give a net without values (on the meta device) the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from sfumato.errors import UserError, nearest
from sfumato.formats.planned import Writable
from sfumato.memory.quantise import Stored, stored_layers

Net = TypeVar("Net", bound=nn.Module)
SHOWN = 5


def shapes(tensors: Mapping[str, Writable]) -> dict[str, tuple[int, ...]]:
    """{name: shape}, from which nets read their sizes."""
    return {name: tuple(t.shape) for name, t in tensors.items()}


def fill(net: Net, tensors: Mapping[str, Tensor], what: str) -> Net:
    """The net with these very tensors as its own, frozen and in eval mode. Layers that store their weights in fewer
    bits have them already.

    Errors: as `check`.
    """
    stored = {f"{path}.weight": tuple(layer.shape) for path, layer in stored_layers(net).items()}
    check(net, {**stored, **shapes(tensors)}, what)
    _assign(net, tensors)
    return net.eval().requires_grad_(False)


def drop(net: nn.Module) -> None:
    """Give up the tensors that `fill` gave the net; buffers that no file holds stay."""
    _assign(net, {name: t.to("meta") for name, t in net.state_dict().items()})


def _assign(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict(tensors, assign=True)` for names that are known to fit, which it goes through for each part."""
    for path, part in net.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(part, Stored) and f"{prefix}weight" in tensors:
            part.put(tensors[f"{prefix}weight"])
        for name, held in part._parameters.items():
            if held is not None and prefix + name in tensors:
                part._parameters[name] = nn.Parameter(tensors[prefix + name], held.requires_grad)
        for name in part._buffers:
            if prefix + name in tensors:
                part._buffers[name] = tensors[prefix + name]


def check(net: nn.Module, given: Mapping[str, tuple[int, ...]], what: str) -> None:
    """That tensors of these names and shapes are those of the net.

    Errors: `UserError` that names what is missing, left over or of another shape; `what`: whose tensors they are.
    `RuntimeError` for a net with buffers that no file fills.
    """
    wanted = shapes(net.state_dict())
    if empty := [name for name, t in net.named_buffers() if t.is_meta and name not in wanted]:
        raise RuntimeError(
            f"{type(net).__name__} for {what}: the buffer {', '.join(empty)} is not persistent, so no file fills it: "
            "make it in forward, or register it persistent and in the key table"
        )
    wrong = [f"{what} lacks the tensor {name!r} {shape}" for name, shape in wanted.items() if name not in given]
    wrong += [
        f"{what} has the tensor {name!r}, which has no place in the net{nearest(name, wanted)}"
        for name in given
        if name not in wanted
    ]
    wrong += [
        f"{what}: tensor {name!r} has shape {given[name]}, expected {shape}"
        for name, shape in wanted.items()
        if given.get(name, shape) != shape
    ]
    if wrong:
        more = [f"... and {len(wrong) - SHOWN} more such tensors"] if len(wrong) > SHOWN else []
        raise UserError(*wrong[:SHOWN], *more)
