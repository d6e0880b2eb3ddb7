"""Truncated matrices, against torch's own singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from sfumato.tensors.low_rank import product, recompressed, truncated


def decaying(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall, as those of trained changes do."""
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=g))
    v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=g))
    return u * (torch.arange(1, min(m, n) + 1.0) ** -0.7) @ v.T


@pytest.mark.parametrize(("m", "n", "rank"), [(9, 7, 3), (7, 9, 7), (300, 200, 8), (200, 300, 150)])
def test_the_nearest_matrix_of_a_rank(m: int, n: int, rank: int) -> None:
    matrix = decaying(m, n)
    found = truncated(matrix, rank, torch.Generator().manual_seed(1))
    assert found.up.shape == (m, rank) and found.down.shape == (rank, n)
    missing = torch.linalg.matrix_norm(matrix - found.up @ found.down)
    least = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
    assert missing <= 1.01 * least + 1e-5
    assert found.error == pytest.approx(float(missing / torch.linalg.matrix_norm(matrix)), rel=1e-2, abs=2e-3)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_a_product_is_decomposed_by_its_factors() -> None:
    g = torch.Generator().manual_seed(2)
    up, down = torch.randn(40, 5, generator=g), torch.randn(5, 30, generator=g)
    u, s, vh = product(up, down)
    torch.testing.assert_close(u * s @ vh, up @ down, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(s, torch.linalg.svdvals(up @ down)[:5], rtol=1e-4, atol=1e-4)
    found = recompressed(up, down, 2)
    left = torch.linalg.matrix_norm(up @ down - found.up @ found.down)
    torch.testing.assert_close(left, torch.linalg.svdvals(up @ down)[2:].square().sum().sqrt(), rtol=1e-3, atol=1e-3)
    assert found.error == pytest.approx(float(left / torch.linalg.matrix_norm(up @ down)), rel=1e-3)


def test_nothing_stays_nothing() -> None:
    found = truncated(torch.zeros(6, 5), 2, torch.Generator())
    assert found.error == 0 and not (found.up @ found.down).any()
