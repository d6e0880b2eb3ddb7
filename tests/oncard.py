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
from sfumato.train import dist, loop, run

CARD = torch.device("meta")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "bincount"}
"""Operators that wait for what a device computes."""
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
"""Functions that copy values of Python to a device."""


class Queue:
    """A stand-in for a stream, and for its events."""

    device = CARD

    def __init__(self, device: Any = CARD) -> None:
        pass

    def record_event(self, event: Any = None) -> Queue:
        return self

    def nothing(self, *_: Any) -> None:
        pass

    wait_event = wait_stream = synchronize = nothing


class Wait(AssertionError):
    """The host would wait for the card, or an operator would fail there."""


@dataclass
class Seen:
    """What a step did."""

    copies: list[str] = field(default_factory=list)
    """To the card, which nothing waits for."""
    back: list[str] = field(default_factory=list)
    """To the host, the same."""
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
            if self._copy(name, args, kwargs):
                return args[0]  # it has no values that could be copied
        elif there and name in READS:
            raise Wait(f"{func} reads from the card")
        elif there and name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in there[1:]):
            raise Wait(f"{func} reads a mask from the card")
        elif there and any(t.ndim for t in here):
            raise Wait(f"{func} has tensors of the host and of the card")
        # A view computes nothing.
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.seen.operators[name] += 1
        if there and name.startswith(("_foreach_", "_fused_")) and name.endswith("_"):
            return None  # without values nothing changes; torch would go through them one by one
        return func(*args, **kwargs)

    def _copy(self, name: str, args: Any, kwargs: Any) -> bool:
        """Note a copy from one side to the other; whether it is one to the host."""
        source, into = (args[0], kwargs.get("device")) if name == "_to_copy" else (args[1], args[0].device)
        into = source.device if into is None else torch.device(into)
        if source.device.type == into.type:
            return False
        what, back = f"{name} of {tuple(source.shape)} to {into}", into.type != CARD.type
        if not (
            (name == "copy_" and args[2:] == (True,)) or (kwargs.get("non_blocking") and not (back and name != "copy_"))
        ):
            raise Wait(f"{what}, which is waited for")
        (self.seen.back if back else self.seen.copies).append(what)
        return back


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextmanager
def standing_in() -> Iterator[None]:
    """Within, torch takes the card for one."""
    autocast, enabled, seed, empty = torch.autocast, torch.is_autocast_enabled, torch.Generator, torch.empty
    stand_ins = {
        # There is none for what has no values.
        "autocast": lambda kind, *args, **more: autocast("cpu" if kind == CARD.type else kind, *args, **more),
        "is_autocast_enabled": lambda kind: enabled("cpu" if kind == CARD.type else kind),
        "Generator": lambda device="cpu": seed(),
        "empty": lambda *args, pin_memory=False, **more: empty(*args, **more),
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch, name, stand_in))
        stack.enter_context(patch.object(torch, "Stream", Queue))
        stack.enter_context(patch.object(torch.accelerator, "current_stream", Queue))
        stack.enter_context(patch.object(torch.accelerator, "set_stream", Queue))
        stack.enter_context(patch.object(Tensor, "record_stream", lambda *_: None))
        # As for cards, where many tensors are taken at once.
        for module in (_foreach_utils, import_module("torch.optim.optimizer")):
            for kind in ("foreach", "fused"):
                supported = patch.object(module, f"_get_{kind}_kernels_supported_devices", lambda: [CARD.type])
                stack.enter_context(supported)
        yield


@contextmanager
def watched() -> Iterator[Seen]:
    """Watch what is done within."""
    seen = Seen()
    with standing_in(), _Makers(), _Operators(seen):
        yield seen


@contextmanager
def _kept_weights() -> Iterator[None]:
    """What was made for a weight stays with it where it moves to the card."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


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
    """`runs.test_families.prepared` (`prepare`), ready for its first step, on the card. `short`: see `shorten`."""
    place = run.place_models

    def placed(config: Any, models: Any, *more: Any) -> Any:
        if short:
            shorten(models.denoiser)
        return place(config, models, *more)

    world = patch.object(dist, "world", lambda: dist.World(0, 1, CARD))
    with standing_in(), _kept_weights(), world, patch.object(run, "place_models", placed):
        a_run: loop.Run = prepare(case, files, images, out, method, **settings)
    if a_run.log:
        a_run.log.__exit__()
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
    with standing_in():
        return next(next(steps).batches)


def step(a_run: loop.Run, batch: Batch) -> Seen:
    """What an optimizer step on a batch does."""
    with watched() as seen:
        loop._optimizer_step(a_run, StepBatches(iter([batch]), 1, len(batch)))
    return seen
