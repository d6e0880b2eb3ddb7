"""Several tensors in one run of bytes, so that they are copied to a device at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes; where each tensor begins. What kernels of any device want."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies."""

    start: int
    """In bytes."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each of several tensors lies in `nbytes` bytes."""

    places: Mapping[str, Place]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """One after another, each at the next multiple of `ALIGNMENT`."""
        places, end = {}, 0
        for name, t in tensors.items():
            place = Place(end, tuple(t.shape), t.dtype)
            places[name] = place
            end += -(-place.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(places, end)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """flat (nbytes,) uint8, or longer -> the tensors that lie in it, contiguous, in its memory."""
        return {name: flat[p.start : p.start + p.nbytes].view(p.dtype).view(p.shape) for name, p in self.places.items()}

    def pack(self, tensors: Mapping[str, Tensor], flat: Tensor) -> None:
        """Copy the tensors into their places in `flat`, on the device that each is on or another."""
        for name, view in self.views(flat).items():
            view.copy_(tensors[name])
