"""Whole numbers as products, and rotations from skew-symmetric matrices, as adapters need them."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor


def factorization(number: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m * n = number and m <= n, as LyCORIS and sd-scripts choose them: one is `factor` if that divides,
    else m is the largest divisor up to `factor`; -1: as close to a square as there is."""
    if factor > 0 and number % factor == 0:
        m = min(factor, number // factor)
    else:
        most = isqrt(number) if factor < 0 else min(factor, isqrt(number))
        m = max((d for d in range(1, most + 1) if number % d == 0), default=1)
    return m, number // m


def skew(blocks: Tensor) -> Tensor:
    """(..., n, n) -> Q = B - B^T in fp32."""
    blocks = blocks.float()
    return blocks - blocks.mT


def cayley(q: Tensor) -> Tensor:
    """R - I of the rotation R = (I + Q) (I - Q)^-1, for skew-symmetric Q, (..., n, n) in fp32.

    The difference itself, which is exact for small Q. No number is read back from the device: I - Q is never singular.
    """
    eye = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    change: Tensor = torch.linalg.solve_ex(eye - q, 2 * q)[0]
    return change
