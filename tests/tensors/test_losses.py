"""Losses against torch's own and against sd-scripts' formulas, and their one reduction."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sfumato.tensors.losses import huber_threshold, loss, sample_losses

SAID, TARGET = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
C = torch.tensor([0.05, 0.1, 1.0])


def test_l1_and_l2_are_torchs() -> None:
    torch.testing.assert_close(loss("l2", SAID, TARGET), F.mse_loss(SAID, TARGET, reduction="none"))
    torch.testing.assert_close(loss("l1", SAID, TARGET), F.l1_loss(SAID, TARGET, reduction="none"))


def test_huber_losses_use_each_samples_threshold() -> None:
    d, c = SAID - TARGET, C.view(3, 1, 1, 1)
    torch.testing.assert_close(loss("huber", SAID, TARGET, c=C), 2 * c * ((d**2 + c**2).sqrt() - c))
    torch.testing.assert_close(loss("smooth_l1", SAID, TARGET, c=C), 2 * ((d**2 + c**2).sqrt() - c))


@given(st.floats(-4, 4), st.floats(1e-3, 10))
def test_huber_passes_from_squared_to_absolute(d: float, c: float) -> None:
    value = loss("huber", torch.tensor([[d]]), torch.zeros(1, 1), c=torch.tensor([c])).item()
    assert value <= d * d * (1 + 1e-5) + 1e-12
    assert value <= 2 * c * abs(d) * (1 + 1e-5) + 1e-12


def test_huber_keeps_its_digits_near_zero() -> None:
    d = torch.full((1, 1), 1e-5, requires_grad=True)
    value = loss("huber", d, torch.zeros(1, 1), c=torch.ones(1))
    assert value.item() == pytest.approx(1e-10, rel=1e-4)
    (gradient,) = torch.autograd.grad(value.sum(), d)
    assert gradient.item() == pytest.approx(2e-5, rel=1e-4)


def test_a_huber_loss_without_a_threshold_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="threshold"):
        loss("huber", SAID, TARGET)


def test_losses_of_16_bits_are_computed_in_fp32() -> None:
    prediction, target = torch.tensor([[300.0]], dtype=torch.float16), torch.zeros(1, 1, dtype=torch.float16)
    assert loss("l2", prediction, target).item() == 90000


def test_thresholds() -> None:
    t, sigma = torch.tensor([0, 500, 999]), torch.tensor([0.0, 1.0, math.inf])
    torch.testing.assert_close(huber_threshold("constant", 0.1, 2.0, t, sigma, 1000), torch.full((3,), 0.2))
    exponential = [2 * math.exp(math.log(0.1) / 1000 * n) for n in (0, 500, 999)]
    torch.testing.assert_close(huber_threshold("exponential", 0.1, 2.0, t, sigma, 1000), torch.tensor(exponential))
    torch.testing.assert_close(
        huber_threshold("snr", 0.1, 1.0, t, sigma, 1000), torch.tensor([1.0, 0.9 / 4 + 0.1, 0.1])
    )
    torch.testing.assert_close(huber_threshold("snr", 0.1, 2.0, t, sigma, 1000), torch.tensor([2.0, 0.65, 0.2]))


def test_the_order_of_weights() -> None:
    error = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]], [[[0.5, 1.0]]]])
    timestep, sample = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.5])
    assert sample_losses(error, None, timestep, sample).tolist() == [4.0, 9.0]
    assert sample_losses(error, mask, timestep, sample).tolist() == [1.0, 7.125]


def test_a_mask_covers_all_channels() -> None:
    error, mask = torch.ones(1, 4, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert sample_losses(error, mask, torch.ones(1), torch.ones(1)).tolist() == [0.25]
