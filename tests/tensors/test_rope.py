"""Rotary positions against diffusers'."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from sfumato.tensors.rope import rope, rotate, rotate_halves

WIDTHS = (16, 56, 56)


def positions() -> torch.Tensor:
    """As in an image of 2048 x 2048, the largest in use, at some places."""
    return torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 5, 93], [0, 127, 64], [3, 127, 127]])


def test_heads_are_turned_as_in_diffusers() -> None:
    x = torch.randn(2, 3, 6, 128, generator=torch.Generator().manual_seed(0))
    want = apply_rotary_emb(x.transpose(1, 2), FluxPosEmbed(10_000, WIDTHS)(positions()), sequence_dim=1).transpose(
        1, 2
    )
    # fp32 angles of up to 127 are known to 1e-5; diffusers' are fp64 until they are cosines.
    torch.testing.assert_close(rotate(x, rope(positions(), WIDTHS, 10_000)), want, atol=5e-5, rtol=0)


def test_products_of_turned_heads_depend_on_the_distance_alone() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(6, 128, generator=g), torch.randn(6, 128, generator=g)
    here, there = rope(positions(), WIDTHS, 10_000), rope(positions() + torch.tensor([2, 7, 11]), WIDTHS, 10_000)
    torch.testing.assert_close(
        rotate(q, here) @ rotate(k, here).T, rotate(q, there) @ rotate(k, there).T, atol=1e-3, rtol=1e-4
    )


def test_positions_may_differ_between_samples() -> None:
    x = torch.randn(2, 4, 6, 32, generator=torch.Generator().manual_seed(0))
    each = torch.stack([positions(), positions().flip(0)])
    table = rope(each, (4, 14, 14), 10_000)
    assert table.shape == (2, 2, 6, 16)
    for i in range(2):
        assert torch.equal(rotate(x, table[:, :, None])[i], rotate(x[i], rope(each[i], (4, 14, 14), 10_000)))


def test_angles_are_fp32_in_a_net_of_16_bits() -> None:
    x = torch.randn(1, 1, 6, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = rope(positions(), WIDTHS, 10_000)
    y = rotate(x, table)
    assert table.dtype == torch.float32
    assert torch.equal(y, rotate(x.float(), table).bfloat16())


def test_halves_are_turned_as_neighbours_are() -> None:
    """The same turn, of channels in another order."""
    x = torch.randn(2, 3, 6, 128, generator=torch.Generator().manual_seed(0))
    table = rope(positions(), WIDTHS, 10_000)
    woven = torch.stack(x.chunk(2, -1), -1).flatten(-2)
    turned = torch.cat(rotate(woven, table).unflatten(-1, (-1, 2)).unbind(-1), -1)
    torch.testing.assert_close(rotate_halves(x, table), turned, atol=1e-6, rtol=0)
