"""Low-rank algebra: what is left of a matrix when only its largest singular values are kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLE, POWERS = 16, 4
"""Of the randomised decomposition: further columns, and power iterations, by which its error is within a percent or so
of the least possible."""
EXACT = 4
"""A decomposition is exact where at least one in so many singular values is wanted: then it costs about the same."""


class Truncated(NamedTuple):
    """`up @ down` is near to a matrix; both have their share of the singular values, so that neither is large."""

    up: Tensor
    """(m, rank), fp32"""
    down: Tensor
    """(rank, n), fp32"""
    singular: Tensor
    """(k,) the matrix' singular values that were found, largest first; k >= rank."""
    error: float
    """Frobenius norm of what is missing, as a share of the matrix' own."""


def truncated(matrix: Tensor, rank: int, generator: torch.Generator) -> Truncated:
    """The best (m, n) matrix of a rank, up to the error of a randomised decomposition for small ranks of large
    matrices (Halko et al., arXiv:0909.4061); the error is stated, not estimated."""
    matrix = matrix.float()
    m, n = matrix.shape
    rank = max(1, min(rank, m, n))
    if rank * EXACT >= min(m, n) or rank + OVERSAMPLE >= min(m, n):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return _cut(u, s, vh, rank, _norm(s))
    start = torch.randn(n, rank + OVERSAMPLE, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    small, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    u = basis @ small
    return _cut(u, s, vh, rank, float(torch.linalg.matrix_norm(matrix)))


def product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of `up @ down`, (m, r) and (r, n), by matrices of r x r alone: u (m, k), s (k,),
    vh (k, n)."""
    left, right = torch.linalg.qr(up.float()), torch.linalg.qr(down.float().T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ u, s, vh @ right.Q.T


def recompressed(up: Tensor, down: Tensor, rank: int) -> Truncated:
    """The best product of a rank for `up @ down`, (m, r) and (r, n); exact."""
    u, s, vh = product(up, down)
    return _cut(u, s, vh, max(1, min(rank, len(s))), _norm(s))


def _norm(singular: Tensor) -> float:
    """Frobenius norm of a matrix of these singular values; in fp64, or what little a rank leaves out would be lost."""
    return float(singular.double().square().sum().sqrt())


def _cut(u: Tensor, s: Tensor, vh: Tensor, rank: int, norm: float) -> Truncated:
    root = s[:rank].sqrt()
    left = max(0.0, norm**2 - float(s[:rank].double().square().sum()))
    return Truncated(u[:, :rank] * root, root[:, None] * vh[:rank], s, left**0.5 / norm if norm else 0.0)
