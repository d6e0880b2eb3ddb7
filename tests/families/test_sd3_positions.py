"""Positions of SD3's images, against diffusers' tables."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from sfumato.families.sd3.positions import SPAN, embedded, places, scaled
from sfumato.tensors.random import SampleRandom


@pytest.mark.parametrize("patches", [64, 32, 48])
def test_a_square_image_of_any_size_spans_what_one_of_1024_does(patches: int) -> None:
    """For 64 x 64 patches that is the middle of the published tables, which go by a quarter a patch."""
    where = scaled(torch.tensor([[patches, patches]]), 0.0, SampleRandom([1]))
    got = embedded(where, patches, patches, 64)
    wanted = get_2d_sincos_pos_embed(64, patches, base_size=int(SPAN), output_type="pt").float()
    torch.testing.assert_close(got[0], wanted, atol=1e-5, rtol=1e-5)


def test_rows_and_columns_of_a_wide_image() -> None:
    """4 rows and 16 columns have the scale of 8 x 8, and their middle is that of 8 x 8."""
    where = scaled(torch.tensor([[4, 16], [8, 8]]), 0.0, SampleRandom([1, 2]))
    assert where[0, 2] == where[1, 2] == SPAN / 8
    middle = where[:, :2] + where[:, 2:] * torch.tensor([[4, 16], [8, 8]]) / 2
    assert torch.equal(middle, torch.full((2, 2), SPAN / 2))
    got = embedded(where[:1], 4, 16, 32).view(4, 16, 32)
    assert torch.equal(got[0, :, :16], got[3, :, :16]) and torch.equal(
        got[:, 0, 16:], got[:, 9, 16:]
    )  # columns first, then rows
    assert not torch.equal(got[0, 0], got[0, 1]) and not torch.equal(got[0, 0], got[1, 0])


def test_chance_moves_a_image_within_half_as_much_again() -> None:
    patches = torch.tensor([[16, 16]]).expand(300, 2)
    where = scaled(patches, 1.0, SampleRandom(range(300)))
    first = where[:, :2] / where[:, 2:]
    assert first.min() == -4 and first.max() == 4  # a table of 24, whose middle 16 are the span
    again = scaled(patches[:1], 1.0, SampleRandom([7]))
    assert torch.equal(again, where[7:8])
    assert torch.equal(places(patches[:1], 16, 1.0, SampleRandom([7])), torch.zeros(1, 2, dtype=torch.long))
