"""Rotations by Hadamard matrices, which spread what is large in few columns over many: fewer bits then lose less."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rotated(x: Tensor, group: int) -> Tensor:
    """(..., columns), each group of `group` columns times the symmetric regular Hadamard matrix of that size over its
    root; doing so twice gives `x` back.

    The matrix is H4 ⊗ H4 ⊗ ..., whose rows have one sum (ConvRot, arXiv:2512.03673; comfy-kitchen's int8). Errors:
    `ValueError` for a group that is no power of 4, and for columns that are no whole number of groups.
    """
    if group < 4 or group.bit_count() != 1 or group.bit_length() % 2 == 0 or x.shape[-1] % group:
        raise ValueError(f"{x.shape[-1]} columns cannot be rotated in groups of {group}")
    outer = 4 ** (group.bit_length() // 4)  # (A ⊗ B) vec(X) = vec(A X B'): two small products for a large one
    a, b = (_regular(n).to(x.device, x.dtype) for n in (outer, group // outer))
    return (a @ x.reshape(-1, outer, group // outer) @ b).view(x.shape)


@lru_cache
def _regular(size: int) -> Tensor:
    """(size, size) fp32, orthogonal and symmetric."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.kron(made, four / 2)
    return made
