"""What checkpointed blocks were given waits on the host from a block's forward pass until its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sfumato.memory.backends import Backend, Streams, Threaded

SMALL = 2**20
"""Bytes; what is smaller stays on the device, as nothing would be won."""


class Kept:
    """A tensor that a block was given, or several were."""

    def __init__(self, t: Tensor, host: Tensor, stored: Any) -> None:
        """`host`: the bytes that it is copied to; `stored`: the copy."""
        self.host, self.stored = host, stored
        self.shape, self.stride, self.dtype = t.shape, t.stride(), t.dtype
        self.here: Tensor | None = t
        """The tensor, while it is on the device."""
        self.loaded: Any = None
        """The copy by which it comes back."""


@dataclass(eq=False)
class Inputs:
    """What a block was given."""

    before: weakref.ref[Inputs] | None
    """Of the block before, whose backward pass comes next."""
    kept: list[Kept] = field(default_factory=list)


@dataclass(frozen=True)
class Ticket:
    """What autograd holds in the place of a tensor."""

    kept: Kept
    inputs: Inputs


class Offload:
    """Copies what blocks are given to the host, and back while the block behind them is in its backward pass.

    A copy goes on beside the computation of the block, and the tensor is given up when the next one begins; so what the
    last block was given never leaves. What several blocks are given is copied once. The host's memory is used again in
    the next step.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: weakref.WeakValueDictionary[tuple[object, ...], Kept] = weakref.WeakValueDictionary()
        self._free: dict[int, list[Tensor]] = {}
        self._forward: weakref.ref[Inputs] | None = None
        self._backward: weakref.ref[Inputs] | None = None
        """Of the block that ran last."""
        self._coming: list[Kept] = []
        """Held, as memory must not go while it is copied to."""

    @classmethod
    def on(cls, device: torch.device) -> Offload:
        """Of a device, with a queue of copies of its own."""
        return cls(Threaded() if device.type == "cpu" else Streams(device))

    @contextmanager
    def block(self) -> Iterator[None]:
        """Around the call of a block: what autograd saves of what it was given goes to the host."""
        before = self._forward() if self._forward else None
        for kept in before.kept if before else []:  # is given up; its memory is used again once it is on the host
            self._backend.wait(kept.stored)
            kept.here = None
        self._arrive()
        inputs = Inputs(self._forward)
        self._forward = weakref.ref(inputs)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: self._pack(t, inputs), self._unpack):
            yield

    def _pack(self, t: Tensor, inputs: Inputs) -> Tensor | Ticket:
        if t.device.type != self._backend.device.type or t.nbytes < SMALL or not _is_dense(t):
            return t
        # The weak reference sees to it that no other tensor's memory has the same number meanwhile.
        memory = StorageWeakRef(t.untyped_storage())  # type: ignore[no-untyped-call]
        place = (memory, t.storage_offset(), t.shape, t.stride(), t.dtype, t._version)
        kept = self._known.get(place)
        if kept is None:
            host = self._buffer(t.nbytes)
            kept = self._known[place] = Kept(t, host[: t.nbytes], self._backend.store(_bytes(t), host[: t.nbytes]))
            weakref.finalize(kept, self._free[len(host)].append, host)
        kept.here = t
        inputs.kept.append(kept)
        return Ticket(kept, inputs)

    def _unpack(self, ticket: Tensor | Ticket) -> Tensor:
        if isinstance(ticket, Tensor):
            return ticket
        if self._backward is None or self._backward() is not ticket.inputs:
            self._return(ticket.inputs)
        assert ticket.kept.here is not None
        return ticket.kept.here

    def _return(self, inputs: Inputs) -> None:
        """What a block was given is there from here on; that of the next one sets out."""
        self._fetch(inputs)
        self._arrive()
        if before := inputs.before and inputs.before():
            self._fetch(before)
        self._backward = weakref.ref(inputs)

    def _fetch(self, inputs: Inputs) -> None:
        """Begin to copy to the device what is not there."""
        for kept in inputs.kept:
            if kept.here is None:
                slot = self._backend.slot(len(kept.host))
                kept.loaded = self._backend.load(kept.host, slot)
                kept.here = slot.view(kept.dtype).as_strided(kept.shape, kept.stride)
                self._coming.append(kept)

    def _arrive(self) -> None:
        """What is computed from here on comes after all that is on its way to the device."""
        for kept in self._coming:
            self._backend.wait(kept.loaded)
        self._coming = []

    def _buffer(self, nbytes: int) -> Tensor:
        """So many bytes of the host or more, which `_free` has for the next that asks when they are free: of images of
        every shape alike, so there are few sizes."""
        size = 1 << (nbytes - 1).bit_length()
        free = self._free.setdefault(size, [])
        return free.pop() if free else self._backend.host(size)


def _is_dense(t: Tensor) -> bool:
    """Whether its numbers lie side by side in memory, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _bytes(t: Tensor) -> Tensor:
    return t.as_strided((t.numel(),), (1,)).view(torch.uint8)
