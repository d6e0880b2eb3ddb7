"""Stochastic rounding."""

from __future__ import annotations

import pytest
import torch

from sfumato.tensors.rounding import stochastic_round_


def _round(high: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return stochastic_round_(
        torch.empty_like(high, dtype=torch.bfloat16), high, torch.Generator().manual_seed(seed)
    ).float()


def test_a_number_that_fits_stays():
    high = torch.randn(1000).bfloat16().float()
    assert torch.equal(_round(high), high)


def test_goes_to_one_of_the_two_neighbours():
    high = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    low = _round(high)
    down = (high.view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = ((high.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert ((low == down) | (low == up)).all()
    assert (low == down).any()
    assert (low == up).any()


@pytest.mark.parametrize("value", [1.001, -3.3337, 1e-20, 1e-39])
def test_keeps_the_mean(value):
    high = torch.full((200_000,), value)
    step = (_round(high).max() - _round(high).min()).item()
    assert abs(_round(high).double().mean().item() - high[0].double().item()) < 0.01 * step


def test_a_small_change_is_not_lost():
    low = torch.ones(10_000, dtype=torch.bfloat16)
    for seed in range(20):
        stochastic_round_(low, low.float() + 1e-4, torch.Generator().manual_seed(seed))
    assert low.float().mean().item() == pytest.approx(1 + 20e-4, abs=4e-4)
    assert (torch.ones(1, dtype=torch.bfloat16) + 1e-4) == 1  # what plain rounding does


def test_what_is_not_finite_stays():
    low = _round(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0]))
    assert low[:2].tolist() == [torch.inf, -torch.inf]
    assert low[2].isnan()
    assert low[3:].tolist() == [0.0, 0.0]


def test_follows_from_the_generator():
    high = torch.randn(1000)
    assert torch.equal(_round(high, 1), _round(high, 1))
    assert not torch.equal(_round(high, 1), _round(high, 2))


def test_works_on_strided_tensors():
    high = torch.randn(8, 6).t()
    low = stochastic_round_(torch.empty(8, 6, dtype=torch.bfloat16).t(), high, torch.Generator().manual_seed(0))
    assert (low.float() - high).abs().max() < 0.04


def test_refuses_other_dtypes():
    with pytest.raises(TypeError, match="bf16"):
        stochastic_round_(torch.empty(2, dtype=torch.float16), torch.zeros(2), torch.Generator())
