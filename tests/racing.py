"""A card for tests: a bounded region of memory whose copies are late and torn, and which is poisoned where it is free; to compute with what is on
the host is an error there, as on a real one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.memory.backends import Threaded

POISON = 255
"""NaN in every format of floating point that has one."""


class Racing(Threaded):
    """`loads`, `stores`: the sizes of what was copied."""

    def __init__(
        self,
        *,
        room: int | None = None,
        seed: int = 0,
        longest: float = 2e-4,
        seconds: Callable[[int], float] | None = None,
    ) -> None:
        """`room`: bytes of the device; None: any. `longest`: seconds that a copy is late at most; or they are `seconds` of its bytes."""
        super().__init__()
        self.room, self.random, self.longest, self.seconds = room, random.Random(seed), longest, seconds
        self.taken, self.homes = 0, set[int]()
        self.loads, self.stores = list[int](), list[int]()
        self.waited, self.finished = 0.0, 0

    def slot(self, nbytes: int) -> Tensor:
        self.taken += nbytes
        assert self.room is None or self.taken <= self.room, "out of memory"
        return super().slot(nbytes).fill_(POISON)

    def host(self, nbytes: int) -> Tensor:
        flat = super().host(nbytes)
        self.homes.add(flat.untyped_storage().data_ptr())
        return flat

    def load(self, source: Any, slot: Tensor) -> Any:
        self.loads.append(len(slot))
        slot.fill_(POISON)
        return super().load(source, slot)

    def store(self, slot: Tensor, host: Tensor) -> Any:
        self.stores.append(len(slot))
        return super().store(slot.clone(), host)  # a stream copies it before what comes next

    def wait(self, copy: Any) -> None:
        begun = time.perf_counter()
        super().wait(copy)
        self.waited += time.perf_counter() - begun

    def finish(self) -> None:
        super().finish()
        self.finished += 1

    def copy(self, source: Any, into: Tensor) -> None:
        if self.seconds:
            time.sleep(self.seconds(len(into)))
        else:
            time.sleep(self.random.random() * self.longest)
        super().copy(source, into)


class Guard(TorchDispatchMode):
    """Two devices in one operation, as an accelerator refuses them."""

    def __init__(self, backend: Racing) -> None:
        super().__init__()
        self.homes = backend.homes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for each in _tensors((*args, *(kwargs or {}).values())):
            if each.untyped_storage().data_ptr() in self.homes and not _is_allowed(func):
                raise RuntimeError(f"{func}: a tensor is on the host")
        return func(*args, **(kwargs or {}))


def _is_allowed(func: Any) -> bool:
    """What goes from device to device, or says nothing of values."""
    aten = torch.ops.aten
    return bool(func.is_view) or func in (aten.detach.default, aten.copy_.default, aten.equal.default)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
