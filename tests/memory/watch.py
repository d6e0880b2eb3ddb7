"""Dispatch modes that see what a step computes, and what it remembers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Operators that ran, by name, and what they made that is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators[func.name()] += 1
        given = _storages((args, kwargs))
        self._made |= {ref: nbytes for ref, nbytes in _storages(out).items() if ref not in given}
        return out

    @property
    def alive(self) -> int:
        """Bytes."""
        return sum(nbytes for storage, nbytes in self._made.items() if not storage.expired())


def _storages(values: Any) -> dict[StorageWeakRef, int]:
    storages = [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor)]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}
