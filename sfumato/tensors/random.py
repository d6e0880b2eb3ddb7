"""Randomness without a global state: every random number is keyed by what it is for.

A key is a 64-bit number made of (seed, epoch, sample, purpose ...), so a number depends on nothing else:
not on worker count, on how batches are cut, or on how many numbers came before (counter-based
generators, Salmon et al. 2011, in spirit; here each has a keyed seed).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A 63-bit number that depends on all parts and their order."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    # A file's name may hold bytes that are not text; any name gives a number.
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `key(*parts)`."""
    return torch.Generator(device).manual_seed(key(*parts))


def python_random(*parts: int | str) -> random.Random:
    """Python's generator seeded with `key(*parts)`, for crops and captions."""
    return random.Random(key(*parts))


@dataclass(frozen=True, slots=True)
class SampleRandom:
    """The random numbers of a batch; those of sample i follow from `keys[i]` and a purpose alone."""

    keys: Sequence[int]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(b, *shape) standard normal numbers, fp32 on the CPU."""
        return torch.stack([torch.randn(tuple(shape), generator=generator(k, purpose)) for k in self.keys])

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(b, *shape) numbers in [0, 1), fp32 on the CPU."""
        return torch.stack([torch.rand(tuple(shape), generator=generator(k, purpose)) for k in self.keys])

    def integers(self, purpose: str, low: int, high: int, device: torch.device | str = "cpu") -> Tensor:
        """(b,) whole numbers in [low, high), int64, drawn on the device."""
        made = (generator(k, purpose, device=device) for k in self.keys)
        return torch.stack([torch.randint(low, high, (), generator=each, device=device) for each in made])
