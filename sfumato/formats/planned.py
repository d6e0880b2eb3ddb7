"""Tensors that are made when they are written: a file of any size is written with one of them in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Rename = Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]]
"""Tensors under other names, fused or cut, one after another: `KeyMap.natives`, say."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor without its values: what a file's header says of it, and how it is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """A tensor of this dtype and shape; may be called more than once."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype | None) -> PlannedTensor:
        """The same in another number format, if it holds floats; None: as it is."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return PlannedTensor(dtype, self.shape, lambda: self.make().to(dtype))


def renamed(rename: Rename, tensors: Mapping[str, PlannedTensor]) -> dict[str, PlannedTensor]:
    """What `rename` makes of these tensors. To make one of the results, those are made that it is made of, no others.

    Errors: as `rename`.
    """
    asked = _Asked(tensors)
    return {
        name: PlannedTensor(t.dtype, tuple(t.shape), _made(rename, name, {n: tensors[n] for n in asked.last()}))
        for name, t in rename(asked)
    }


def _made(rename: Rename, name: str, of: Mapping[str, PlannedTensor]) -> Callable[[], Tensor]:
    return lambda: next(t for n, t in rename({n: t.make() for n, t in of.items()}) if n == name)


class _Asked(Mapping[str, Tensor]):
    """Stand-ins without values, which know who was asked for last."""

    def __init__(self, tensors: Mapping[str, PlannedTensor]) -> None:
        self._tensors = tensors
        self._now: list[str] = []
        self._last: list[str] = []

    def last(self) -> list[str]:
        """The names that were asked for since this was called; none since: as then, for pieces of one tensor."""
        if self._now:
            self._last, self._now = self._now, []
        return self._last

    def __getitem__(self, name: str) -> Tensor:
        t = self._tensors[name]
        self._now.append(name)
        return torch.empty(t.shape, dtype=t.dtype, device="meta")

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
