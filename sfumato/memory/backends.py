"""Where streamed blocks wait and where they are used: memory of host and device, and the copies between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from sfumato.errors import UserError

Source = Tensor | Callable[[Tensor], None]
"""What is copied to the device: a run of bytes, or a function that writes it into one on the host."""


class Backend(Protocol):
    """Memory on both sides, and one queue of copies, which are made in the order in which they were asked for."""

    device: torch.device

    def slot(self, nbytes: int) -> Tensor:
        """Bytes of the device."""
        ...

    def host(self, nbytes: int) -> Tensor:
        """Bytes of the host, from which copies are fast."""
        ...

    def load(self, source: Source, slot: Tensor) -> Any:
        """Begin to fill `slot`, once all that was computed so far is done with it. Returns what `wait` takes."""
        ...

    def store(self, slot: Tensor, host: Tensor) -> Any:
        """Begin to copy the other way, once all that was computed so far is done. Returns what `wait` takes."""
        ...

    def wait(self, copy: Any) -> None:
        """What is computed from here on comes after the copy. Errors: those of the copy."""
        ...

    def finish(self) -> None:
        """Wait until every copy is made."""
        ...


class Threaded:
    """A CPU: the device is the same memory, and a thread copies beside the computation."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "streaming")
        self._last: Future[None] | None = None

    def slot(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def load(self, source: Source, slot: Tensor) -> Future[None]:
        return self._queue(source, slot)

    def store(self, slot: Tensor, host: Tensor) -> Any:
        return self._queue(slot, host)

    def wait(self, copy: Future[None]) -> None:
        copy.result()

    def finish(self) -> None:
        if self._last:
            self._last.result()

    def _queue(self, source: Source, into: Tensor) -> Future[None]:
        self._last = self._pool.submit(self.copy, source, into)
        return self._last

    def copy(self, source: Source, into: Tensor) -> None:
        """In the thread."""
        if isinstance(source, Tensor):
            into.copy_(source)
        else:
            source(into)


class Streams:
    """An accelerator: a stream of its own copies from and to pinned memory; no call waits for the device."""

    def __init__(
        self, device: torch.device, waiting: int = 0, stream: Any = None, current: Callable[[], Any] | None = None
    ) -> None:
        """`waiting`: bytes that will be asked of the host, if that is known. `stream`, `current`: that of the copies,
        and what gives the one that computes now."""
        self.device = device
        self._left, self._run = waiting, torch.empty(0, dtype=torch.uint8)
        self._stream = torch.Stream(device) if stream is None else stream
        self._current = current or (lambda: torch.accelerator.current_stream(device))

    def slot(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host(self, nbytes: int) -> Tensor:
        if nbytes > len(self._run):
            # torch takes the next power of two of pinned memory; so several share a run that is one.
            whole = 1 << max(self._left.bit_length() - 1, 0)
            self._run = self._pinned(max(whole, 1 << (nbytes - 1).bit_length()))
        flat, self._run = self._run[:nbytes], self._run[nbytes:]
        self._left -= nbytes
        return flat

    def _pinned(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise UserError(
                f"{nbytes / 2**30:.1f} GB of the computer's memory cannot be pinned for what waits there ({error}); "
                "free some of it, or swap fewer blocks"
            ) from None

    def load(self, source: Source, slot: Tensor) -> Any:
        if not isinstance(source, Tensor):
            raise TypeError("only `Staged` copies from memory that is not pinned")
        return self._copy(source, slot, self._current().record_event())

    def store(self, slot: Tensor, host: Tensor) -> Any:
        return self._copy(slot, host, self._current().record_event())

    def wait(self, copy: Any) -> None:
        self._current().wait_event(copy)

    def finish(self) -> None:
        self._stream.synchronize()

    def _copy(self, source: Tensor, into: Tensor, after: Any) -> Any:
        self._stream.wait_event(after)
        with self._on():
            into.copy_(source, non_blocking=True)
            return self._stream.record_event()

    @contextmanager
    def _on(self) -> Iterator[None]:
        """What is called within goes to the stream of the copies."""
        before = self._current()
        torch.accelerator.set_stream(self._stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)


class Staged(Streams):
    """The same where the host has too little memory that can be pinned (Windows gives half of it): a thread copies
    pages of files, or whatever memory, through two pinned buffers."""

    def __init__(
        self, device: torch.device, largest: int, stream: Any = None, current: Callable[[], Any] | None = None
    ) -> None:
        """`largest`: bytes of the largest block."""
        super().__init__(device, 0, stream, current)
        self._pool = ThreadPoolExecutor(1, "streaming")
        self._stages: list[tuple[Tensor, Any]] = [(self._pinned(largest), None) for _ in range(2)]

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def load(self, source: Source, slot: Tensor) -> Future[Any]:
        return self._pool.submit(self._staged, source, slot, self._current().record_event())

    def store(self, slot: Tensor, host: Tensor) -> Any:
        after = self._current().record_event()
        return self._pool.submit(self._stored, slot, host, after)

    def wait(self, copy: Future[Any]) -> None:
        super().wait(copy.result())

    def finish(self) -> None:
        self._pool.submit(super().finish).result()

    def _stored(self, slot: Tensor, host: Tensor, after: Any) -> Any:
        """In the thread, which reads that memory next: not every accelerator waits where it is not pinned."""
        copy = self._copy(slot, host, after)
        copy.synchronize()
        return copy

    def _staged(self, source: Source, slot: Tensor, after: Any) -> Any:
        """In the thread. Errors: those of reading the file."""
        stage, used = self._stages.pop(0)
        if used is not None:
            used.synchronize()  # this thread waits, not the one that computes
        try:
            part = stage[: len(slot)]
            if isinstance(source, Tensor):
                part.copy_(source)
            else:
                source(part)
            used = self._copy(part, slot, after)
        finally:
            self._stages.append((stage, used))
        return used


def backend(device: torch.device, waiting: int, largest: int, processes: int = 1) -> tuple[Backend, bool]:
    """What streams to a device, and whether frozen blocks are packed into memory of its own: where they cannot all be
    pinned, they stay where they are.

    `waiting`: bytes of all blocks that are streamed; `largest`: of one; `processes`: that each hold as many.
    """
    if device.type == "cpu":
        return Threaded(), True
    import psutil

    memory, pinned = psutil.virtual_memory(), waiting * processes
    # Windows pins half of the memory at most, and elsewhere more is not wise. What files back is not counted as taken.
    if pinned <= memory.total / 2 and pinned * 1.1 <= memory.available:
        return Streams(device, waiting), True
    return Staged(device, largest), False
