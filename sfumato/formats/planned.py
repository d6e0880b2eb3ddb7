"""Tensors that are made when they are written: a file of any size is written with one of them in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

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
        return self.then(lambda t: t.to(dtype), dtype)

    def then(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> PlannedTensor:
        """What `change` makes of it: of the same shape, and of its dtype if no other is given."""
        return PlannedTensor(dtype or self.dtype, self.shape, lambda: change(self.make()))


Writable = Tensor | PlannedTensor
"""What a weight file can be written of."""


def made(tensor: Writable) -> Tensor:
    """The tensor with its values."""
    return tensor if isinstance(tensor, Tensor) else tensor.make()


def as_planned(tensor: Writable) -> PlannedTensor:
    """A tensor with values as if it were yet to be made."""
    return PlannedTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor) if isinstance(tensor, Tensor) else tensor


def renamed(rename: Rename, tensors: Mapping[str, Writable]) -> dict[str, Writable]:
    """What `rename` makes of these tensors. Where one of them is planned, so are the results: to make one, those are
    made that it is made of, no others.

    Errors: as `rename`.
    """
    if not any(isinstance(t, PlannedTensor) for t in tensors.values()):
        return dict(rename(cast(Mapping[str, Tensor], tensors)))
    asked = _Asked(tensors)
    return {
        name: PlannedTensor(t.dtype, tuple(t.shape), _maker(rename, name, {n: tensors[n] for n in asked.last()}))
        for name, t in rename(asked)
    }


def _maker(rename: Rename, name: str, of: Mapping[str, Writable]) -> Callable[[], Tensor]:
    return lambda: next(t for n, t in rename({n: made(t) for n, t in of.items()}) if n == name)


class _Asked(Mapping[str, Tensor]):
    """Stand-ins without values, which know who was asked for last."""

    def __init__(self, tensors: Mapping[str, Writable]) -> None:
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
