"""What an optimizer needs once a step waits in the host's memory: its state, and gradients until their time comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 256
"""Tensors of at most so many numbers stay where they are: counters, tables that all weights share."""
_AHEAD = 256 * 2**20
"""Bytes on their way to and fro before the host waits: it must not run ahead until all of them are on the device."""


class Courier:
    """Copies between a device and pinned host memory, on a stream of its own; between tensors of the CPU as they
    come."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = None if device.type == "cpu" else torch.Stream(device=device)
        self._under_way: deque[tuple[Any, int]] = deque()

    def room(self, like: Tensor) -> Tensor:
        """Host memory for a tensor, its values undefined."""
        pinned = self.device.type not in ("cpu", "mps")
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)

    def send(self, tensor: Tensor, home: Tensor, *, add: bool = False) -> None:
        """Copy to `home`, once all that was asked of the device so far is done; `add`: to what is there."""
        with self._beside():
            if add:
                tensor = tensor + home.to(tensor.device, non_blocking=True)
            home.copy_(tensor, non_blocking=True)
        self._keep(tensor, self.stream)

    def fetch(self, home: Tensor) -> Tensor:
        """A copy on the device, which what is asked of it next may use; after all that was sent."""
        if self.stream is None:
            return home.clone()
        with _on(self.stream):
            tensor = home.to(self.device, non_blocking=True)
            arrived = self.stream.record_event()
        current = torch.accelerator.current_stream(self.device)
        current.wait_event(arrived)
        self._keep(tensor, current)
        return tensor

    def settle(self) -> None:
        """Return when what was sent is there."""
        if self.stream is not None:
            self.stream.synchronize()
        self._under_way.clear()

    def pace(self, nbytes: int) -> None:
        """So many bytes are needed no more once what was asked so far is done; waits while these are too many."""
        if self.stream is None:
            return
        self._under_way.append((torch.accelerator.current_stream(self.device).record_event(), nbytes))
        while sum(n for _, n in self._under_way) > _AHEAD:
            self._under_way.popleft()[0].synchronize()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with _on(self.stream):
            yield

    def _keep(self, tensor: Tensor, stream: Any) -> None:
        """Its memory is not given to others before `stream` is done with it."""
        if stream is not None:
            tensor.record_stream(stream)


@contextmanager
def _on(stream: torch.Stream) -> Iterator[None]:
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


class HostGradients:
    """Gradients, or their sums, that wait on the host. The memory is taken once, and kept."""

    def __init__(self, courier: Courier) -> None:
        self.courier = courier
        self._rooms: dict[nn.Parameter, Tensor] = {}
        self._waiting: dict[nn.Parameter, None] = {}

    def add(self, p: nn.Parameter) -> None:
        """Take the parameter's gradient; it is added to what waits of it."""
        assert p.grad is not None
        if p not in self._rooms:
            self._rooms[p] = self.courier.room(p.grad)
        self.courier.send(p.grad, self._rooms[p], add=p in self._waiting)
        self._waiting[p] = None
        p.grad = None

    def give(self, p: nn.Parameter) -> None:
        """Put what waits of it back; it is added to the gradient that there is."""
        if p in self._waiting:
            del self._waiting[p]
            total = self.courier.fetch(self._rooms[p])
            p.grad = total if p.grad is None else p.grad.add_(total)

    def waiting(self) -> list[nn.Parameter]:
        """What waits, in the order in which it came."""
        return list(self._waiting)

    def clear(self) -> None:
        self._waiting.clear()


class HostState:
    """An optimizer's state in the host's memory: brought for the step of a weight, and sent back after it."""

    def __init__(self, optimizer: torch.optim.Optimizer, courier: Courier) -> None:
        self.optimizer, self.courier = optimizer, courier
        self._homes: dict[nn.Parameter, list[Tensor]] = {}
        self._away: set[nn.Parameter] = set()

    def bring(self, weights: Iterable[nn.Parameter]) -> None:
        """Have the state of these weights on the device."""
        for p in weights:
            if p in self._away:
                self._away.remove(p)
                self._replace(p, self.courier.fetch)

    def send(self, weights: Iterable[nn.Parameter]) -> None:
        """Have it on the host."""
        for p in weights:
            if p not in self.optimizer.state:
                continue
            homes = iter(self._homes.get(p, []))
            mine: list[Tensor] = []

            def home(t: Tensor, homes: Iterator[Tensor] = homes, mine: list[Tensor] = mine) -> Tensor:
                room = next(homes, None)
                if room is None or room.shape != t.shape or room.dtype is not t.dtype:
                    room = self.courier.room(t)
                self.courier.send(t, room)
                mine.append(room)
                return room

            self._replace(p, home)
            self._homes[p] = mine
            self._away.add(p)

    def _replace(self, p: nn.Parameter, how: Callable[[Tensor], Tensor]) -> None:
        state = self.optimizer.state[p]
        state.update({name: _mapped(value, how) for name, value in state.items()})

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
        """Pin what was loaded; what is small goes to the device, but for counters that the optimizer reads."""
        for group in self.optimizer.param_groups:
            counts_there = group.get("fused") or group.get("capturable")
            for p in group["params"]:
                state = self.optimizer.state.get(p, {})
                for name, value in list(state.items()):
                    if isinstance(value, Tensor) and value.numel() <= SMALL and (value.numel() > 1 or counts_there):
                        state[name] = value.to(self.courier.device)
        self._homes.clear()
        self.send(p for group in self.optimizer.param_groups for p in group["params"])
        self.courier.settle()


def _mapped(value: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """The same with every large tensor changed, in lists and dicts as well."""
    if isinstance(value, Tensor):
        return how(value) if value.numel() > SMALL else value
    if isinstance(value, dict):
        return {name: _mapped(v, how) for name, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, how) for v in value)
    return value


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(t.nbytes for t in tensors)
