"""A stand-in for an accelerator: what lies on it has no values (torch's meta device), and all that is done with it is
watched. Copies to it are counted; to read a number back from it, or to compute with tensors of both sides, is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tinies.cases import Case, Files
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.config import Method
from sfumato.data.batch import Batch
from sfumato.data.loader import StepBatches
from sfumato.train import dist, fusing, loop, run

CARD = torch.device("meta")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "bincount"}
"""Operators that wait for what a device computes."""
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
"""Functions that copy values of Python to a device."""


class Wait(AssertionError):
    """The host would wait for the card, or an operator would fail there."""


@dataclass
class Seen:
    """What a step did."""

    copies: list[str] = field(default_factory=list)
    """To the card that nothing waits for."""
    operators: Counter[str] = field(default_factory=Counter)
    """Those that compute something, by name."""


class _Makers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS:
            there = kwargs.get("device") or (args[0].device if isinstance(args[0], Tensor) else None)
            if there is not None and torch.device(there).type == CARD.type:
                raise Wait(f"{func.__name__} of values of Python on the card")
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, tensors = func.overloadpacket.__name__, list(_tensors((*args, *kwargs.values())))
        there = [t for t in tensors if t.device.type == CARD.type]
        here = [t for t in tensors if t.device.type != CARD.type]
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs)
        elif there and name in READS:
            raise Wait(f"{func} reads from the card")
        elif there and name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in there[1:]):
            raise Wait(f"{func} reads a mask from the card")
        elif there and any(t.ndim for t in here):
            raise Wait(f"{func} has tensors of the host and of the card")
        # A view computes nothing.
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.seen.operators[name] += 1
        if there and name.startswith("_foreach_") and name.endswith("_"):
            return None  # without values nothing changes; torch would go through them one by one
        return func(*args, **kwargs)

    def _copy(self, name: str, args: Any, kwargs: Any) -> None:
        source, into = (args[0], kwargs.get("device")) if name == "_to_copy" else (args[1], args[0].device)
        into = source.device if into is None else torch.device(into)
        if source.device.type == into.type:
            return
        if into.type != CARD.type:
            raise Wait(f"{name} reads {tuple(source.shape)} from the card")
        if not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
            raise Wait(f"{name} of {tuple(source.shape)} to the card, which is waited for")
        self.seen.copies.append(f"{name} of {tuple(source.shape)}")


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextmanager
def watched() -> Iterator[Seen]:
    """Watch what is done within."""
    autocast, enabled, seed = torch.autocast, torch.is_autocast_enabled, torch.Generator
    stand_ins = {
        # There is none for what has no values.
        "autocast": lambda kind, *args, **more: autocast("cpu" if kind == CARD.type else kind, *args, **more),
        "is_autocast_enabled": lambda kind: enabled("cpu" if kind == CARD.type else kind),
        "Generator": lambda device="cpu": seed(),
    }
    seen = Seen()
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch, name, stand_in))
        # As for cards, where many tensors are taken at once.
        for module in (_foreach_utils, import_module("torch.optim.optimizer")):
            for kind in ("foreach", "fused"):
                supported = patch.object(module, f"_get_{kind}_kernels_supported_devices", lambda: [CARD.type])
                stack.enter_context(supported)
        stack.enter_context(_Makers())
        stack.enter_context(_Operators(seen))
        yield seen


class Elsewhere:
    """A queue of copies for which nobody waits."""

    device = CARD

    def slot(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=CARD)

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def load(self, source: Tensor, slot: Tensor) -> None:
        pass

    def store(self, slot: Tensor, host: Tensor) -> None:
        pass

    def wait(self, copy: None) -> None:
        pass

    def finish(self) -> None:
        pass


def on_card(
    prepare: Any,
    case: Case,
    files: Files,
    images: Path,
    out: Path,
    method: Method,
    *,
    short: bool = False,
    **settings: Any,
) -> loop.Run:
    """`runs.test_families.prepared` (`prepare`), ready for its first step, with its nets on the card. `short`: see `shorten`."""
    place, swap = run.place_models, torch.__future__.get_swap_module_params_on_conversion()

    def there(config: Any, models: Any, trainable: Any, device: Any) -> Any:
        if short:
            shorten(models.denoiser)
        return place(config, models, trainable, CARD)

    torch.__future__.set_swap_module_params_on_conversion(True)  # what was made for a weight stays with it
    try:
        with patch.object(run, "place_models", there), patch.object(fusing, "_copies", lambda device: Elsewhere()):
            a_run: loop.Run = prepare(case, files, images, out, method, **settings)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
    if a_run.log:
        a_run.log.__exit__()
    a_run.world = dist.World(0, 1, CARD)
    return a_run


def shorten(net: nn.Module) -> None:
    """Of blocks that are alike and follow each other, the first one alone is left."""
    for blocks in [m for m in net.modules() if isinstance(m, nn.ModuleList)]:
        shapes = [{name: t.shape for name, t in block.state_dict().items()} for block in blocks]
        if shapes and shapes[0] and all(each == shapes[0] for each in shapes):
            del blocks[1:]


def batch_of(a_run: loop.Run) -> Batch:
    """The first one, on the host."""
    steps = a_run.loader.epoch(0)
    return next(next(steps).batches)


def step(a_run: loop.Run, batch: Batch) -> Seen:
    """What an optimizer step on a batch does."""
    packed = batch.pack(pinned=False)
    with watched() as seen:
        loop._optimizer_step(a_run, StepBatches(iter([packed]), 1, len(batch)))
    return seen
