"""A backend on which every race shows: copies come late, into memory that spoils what is computed with it before."""

from __future__ import annotations

import time
from random import Random

import torch
from torch import Tensor

from sfumato.memory.backends import Source, Threaded


class Delayed(Threaded):
    """Copies when it pleases, into memory that spoils what is used before."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng, self.hosts, self.loads = Random(seed), 0, 0

    def slot(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN

    def host(self, nbytes: int) -> Tensor:
        self.hosts += 1
        return self.slot(nbytes)

    def load(self, source: Source, slot: Tensor) -> object:
        self.loads += 1
        return super().load(source, slot)

    def copy(self, source: Source, into: Tensor) -> None:
        time.sleep(self.rng.choice((0, 0.0005, 0.002)))
        super().copy(source, into)
