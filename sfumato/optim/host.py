"""What waits in the host's memory for the step of its weight: the optimizer's state, gradients, averages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.tensors.packed import ALIGNMENT

SMALL = 256
"""Tensors of at most so many numbers stay where they are: counters, tables that all weights share."""
_AHEAD = 64 * 2**20
"""Bytes that are on their way to the device before they are asked for, or from it after they were given up."""

_COPIES = 64
"""So many of them at most."""


class Copies(Protocol):
    """Host memory, and copies between it and the device in the order in which they were asked for, beside what is
    computed (`memory/backends.py`)."""

    device: torch.device

    def slot(self, nbytes: int) -> Tensor: ...
    def host(self, nbytes: int) -> Tensor: ...
    def load(self, source: Tensor, slot: Tensor) -> Any: ...
    def store(self, slot: Tensor, host: Tensor) -> Any: ...
    def wait(self, copy: Any) -> None: ...
    def finish(self) -> None: ...


@dataclass(eq=False, slots=True)
class _Room:
    """Host memory of a tensor."""

    raw: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    def tensor(self) -> Tensor:
        return self.raw.view(self.dtype).view(self.shape)


class Shelf:
    """Tensors of the device that wait on the host, by key. Those that were taken after a key the last time set out when
    it is taken. The host's memory is taken once, and kept."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self._rooms: dict[Hashable, list[_Room]] = {}
        self._held: dict[Hashable, None] = {}
        self._coming: dict[Hashable, list[tuple[Any, Tensor]]] = {}
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._given_up = 0
        """Bytes of what leaves."""
        self._next: dict[Hashable, Hashable] = {}
        self._last: Hashable = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def keys(self) -> list[Any]:
        """What is there, in the order in which it came."""
        return list(self._held)

    def put(self, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Give up tensors, in place of what was there under the key."""
        rooms = self._rooms.get(key, [])
        if [room.raw.numel() for room in rooms] != [t.nbytes for t in tensors]:
            # Each where a tensor may begin.
            rooms = [
                _Room(self.copies.host(-(-t.nbytes // ALIGNMENT) * ALIGNMENT)[: t.nbytes], t.shape, t.dtype)
                for t in tensors
            ]
        self._rooms[key] = [_Room(room.raw, t.shape, t.dtype) for room, t in zip(rooms, tensors, strict=True)]
        self._drop(key)
        for room, t in zip(rooms, tensors, strict=True):
            t = t.detach().contiguous()
            self._leaving.append((self.copies.store(_bytes(t), room.raw), t))
            self._given_up += t.nbytes
        self._held[key] = None
        # A tensor's memory is used again once what is computed next comes after its copy.
        while self._given_up > _AHEAD or len(self._leaving) > _COPIES:
            self._let_go()

    def take(self, key: Hashable) -> list[Tensor]:
        """The tensors on the device, which what is computed next may use; they are there no more."""
        self._begin(key)
        del self._held[key]
        coming = self._coming.pop(key)
        for copy, _ in coming:
            self.copies.wait(copy)
        if self._last is not None:
            self._next[self._last] = key
        self._last = key
        self._look_ahead(key)
        return [t for _, t in coming]

    def homes(self, key: Hashable) -> list[Tensor]:
        """Where the tensors wait; to be read or written after `settle` alone."""
        return [room.tensor for room in self._rooms[key]]

    def begin(self) -> None:
        """What is taken next is the first one."""
        self._last = None

    def clear(self) -> None:
        """Forget what is there."""
        for key in list(self._coming):
            self._drop(key)
        self._held.clear()

    def settle(self) -> None:
        """Return when what was given up is on the host."""
        for key in list(self._coming):
            self._drop(key)
        while self._leaving:
            self._let_go()
        self.copies.finish()

    def _let_go(self) -> None:
        copy, t = self._leaving.popleft()
        self.copies.wait(copy)
        self._given_up -= t.nbytes

    def _begin(self, key: Hashable) -> None:
        if key not in self._coming:
            rooms = self._rooms[key]
            slots = [self.copies.slot(room.raw.numel()) for room in rooms]
            self._coming[key] = [
                (self.copies.load(room.raw, slot), slot.view(room.dtype).view(room.shape))
                for room, slot in zip(rooms, slots, strict=True)
            ]

    def _look_ahead(self, key: Hashable) -> None:
        room, following = _AHEAD, self._next.get(key)
        while following in self._held and following is not key and room > 0:
            self._begin(following)
            room -= sum(t.nbytes for _, t in self._coming[following])
            following = self._next.get(following)

    def _drop(self, key: Hashable) -> None:
        for copy, _ in self._coming.pop(key, []):
            self.copies.wait(copy)


class HostGradients:
    """Gradients, or their sums, that wait on the host."""

    def __init__(self, copies: Copies) -> None:
        self.shelf = Shelf(copies)

    def add(self, p: nn.Parameter) -> None:
        """Take the parameter's gradient; it is added to what waits of it."""
        self.give(p)
        assert p.grad is not None
        self.shelf.put(p, [p.grad])
        p.grad = None

    def give(self, p: nn.Parameter) -> None:
        """Put what waits of it back; it is added to the gradient that there is."""
        if p in self.shelf:
            (total,) = self.shelf.take(p)
            p.grad = total if p.grad is None else p.grad.add_(total)


class HostState:
    """An optimizer's state in the host's memory: brought for the step of a weight, and sent back after it."""

    def __init__(self, optimizer: torch.optim.Optimizer, copies: Copies) -> None:
        self.optimizer, self.shelf = optimizer, Shelf(copies)

    def bring(self, weights: Iterable[nn.Parameter]) -> None:
        """Have the state of these weights on the device."""
        for p in weights:
            if p in self.shelf:
                self._replace(p, self.shelf.take(p))

    def send(self, weights: Iterable[nn.Parameter]) -> None:
        """Have it on the host."""
        for p in weights:
            if large := _large(self.optimizer.state.get(p, {})):
                self.shelf.put(p, large)
                self._replace(p, self.shelf.homes(p))

    def _replace(self, p: nn.Parameter, tensors: Iterable[Tensor]) -> None:
        """Put tensors in the place of the large ones."""
        state, new = self.optimizer.state[p], iter(tensors)
        state.update({name: _mapped(value, lambda _: next(new)) for name, value in state.items()})

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within, a loaded state comes into the host's memory, never to the device as a whole."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        own = [p.data for p in weights]
        try:
            for p in weights:
                p.data = torch.empty(0, dtype=p.dtype)
            yield
        finally:
            for p, data in zip(weights, own, strict=True):
                p.data = data
        self._adopt()

    def _adopt(self) -> None:
        """Have what was loaded where copies are fast; what is small goes to the device, but for counters that the
        optimizer reads."""
        self.shelf.clear()
        for group in self.optimizer.param_groups:
            counts_there = group.get("fused") or group.get("capturable")
            for p in group["params"]:
                state = self.optimizer.state.get(p, {})
                for name, value in list(state.items()):
                    if isinstance(value, Tensor) and value.numel() <= SMALL and (value.numel() > 1 or counts_there):
                        state[name] = value.to(self.shelf.copies.device)
                self.send([p])
        self.shelf.settle()


def _mapped(value: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """The same with every large tensor changed, in lists and dicts as well."""
    if isinstance(value, Tensor):
        return how(value) if value.numel() > SMALL else value
    if isinstance(value, dict):
        return {name: _mapped(v, how) for name, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, how) for v in value)
    return value


def _large(value: Any) -> list[Tensor]:
    """The tensors that `_mapped` changes, in its order."""
    found: list[Tensor] = []

    def see(t: Tensor) -> Tensor:
        found.append(t)
        return t

    _mapped(value, see)
    return found


def _bytes(t: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    return t.view(-1).view(torch.uint8)


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(t.nbytes for t in tensors)
