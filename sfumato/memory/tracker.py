"""Counts the bytes of tensors that are alive, so that what a step needs is known without a card to run it on.

By storage, as an allocator would: views cost nothing, and a storage that several tensors share costs once. What kernels
take within a call is not seen. torch's own `torch.distributed._tools.mem_tracker` counts in the same way and sorts by
module; it is not used, because it takes hold of every module's hooks, which checkpointing from outside
calls in another order, and because it cannot be told of bytes that no tensor holds (`hold`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_FLOPS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}


class Watch:
    """The most bytes that were alive while it was looked at."""

    __slots__ = ("peak",)

    def __init__(self, live: int) -> None:
        self.peak = live


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, every tensor that an operation makes is counted until its storage is freed."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit`: bytes beyond which an operation raises `torch.OutOfMemoryError`, as a card of that size would."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.flops = 0
        """Of matrix products, convolutions and attention, so far."""
        self.live = 0
        """Bytes that are alive now."""
        self._watches = [Watch(0)]
        self._known: dict[int, weakref.ref[Any]] = {}

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return self._watches[0].peak

    def reset(self) -> None:
        """`peak` is of what comes from here on."""
        self._watches[0].peak = self.live

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """The peak within the context."""
        watch = Watch(self.live)
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    @contextmanager
    def apart(self) -> Iterator[Watch]:
        """What is run within is watched by itself, and by no watch around; it must free what it makes."""
        outer, self._watches = self._watches, [Watch(self.live)]
        try:
            yield self._watches[0]
        finally:
            self._watches = outer

    def know(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that are there already (weights, say); returns their bytes, each storage once."""
        before = self.live
        for tensor in tensors:
            self._count(tensor)
        return self.live - before

    def hold(self, nbytes: int) -> None:
        """Count bytes that no tensor stands for; negative: no longer."""
        self.live += nbytes
        self._seen(0)

    def pulse(self, nbytes: int) -> None:
        """As if so many bytes more had been alive for a moment."""
        self._seen(nbytes)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        nbytes = storage.nbytes()
        self.live += nbytes

        def freed(_: object) -> None:
            del self._known[key]
            self.live -= nbytes

        self._known[key] = weakref.ref(storage, freed)

    def _seen(self, more: int) -> None:
        for watch in self._watches:
            watch.peak = max(watch.peak, self.live + more)
        if self.limit is not None and self.live + more > self.limit:
            raise torch.OutOfMemoryError(f"{self.live + more} bytes are more than the {self.limit} that are allowed")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = self.live
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self._count(each)
        if self.live > before:
            self._seen(0)
        if count := _FLOPS.get(func._overloadpacket):
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        return out
