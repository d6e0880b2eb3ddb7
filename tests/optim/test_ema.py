"""The moving average against diffusers' `EMAModel`."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from memory.delayed import Delayed
from torch import nn

from sfumato.errors import UserError
from sfumato.optim.ema import EMA
from sfumato.optim.host import Shelf


def _weights() -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {"a": nn.Parameter(torch.randn(3, 4, generator=g)), "b": nn.Parameter(torch.randn(5, generator=g))}


def _move(weights: dict[str, nn.Parameter], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for w in weights.values():
        w.data.add_(torch.randn(w.shape, generator=g))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_equals_diffusers(decay):
    weights = _weights()
    mine, other = EMA(weights, decay), EMAModel(weights.values(), decay=decay)
    for i in range(12):
        _move(weights, i)
        mine.update(weights)
        other.step(weights.values())
    for a, b in zip(mine.average.values(), other.shadow_params, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_applied_and_back():
    weights = _weights()
    ema = EMA(weights, 0.9)
    for i in range(4):
        _move(weights, i)
        ema.update(weights)
    own = {name: w.detach().clone() for name, w in weights.items()}
    with pytest.raises(KeyError), ema.applied(weights):
        assert all(torch.equal(w, ema.average[name]) and not torch.equal(w, own[name]) for name, w in weights.items())
        raise KeyError
    assert all(torch.equal(w, own[name]) for name, w in weights.items())


def test_resumed_equals_unbroken():
    weights = _weights()
    whole = EMA(weights, 0.99)
    for i in range(6):
        _move(weights, i)
        whole.update(weights)
        if i == 2:
            half = EMA(weights, 0.99)
            half.load({name: t.clone() for name, t in whole.state().items()})
        elif i > 2:
            half.update(weights)
    assert all(torch.equal(a, b) for a, b in zip(whole.average.values(), half.average.values(), strict=True))


def test_of_bf16_weights_it_is_kept_in_fp32():
    weights = {"a": nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))}
    ema = EMA(weights, 0.999)
    ema.update(weights)
    weights["a"].data.fill_(1.0)
    for _ in range(2):
        ema.update(weights)
    assert ema.average["a"].dtype is torch.float32
    assert ema.average["a"][0].item() == pytest.approx(1 - 2 / 11 * 3 / 12)


def test_refuses_another_state():
    ema = EMA(_weights(), 0.9)
    with pytest.raises(ValueError, match="such as b"):
        ema.load({"a": torch.zeros(3, 4), "updates": torch.tensor(1)})
    with pytest.raises(ValueError, match=r"average of a has shape \(2,\) there"):
        ema.load({"a": torch.zeros(2), "b": torch.zeros(5), "updates": torch.tensor(1)})
    with pytest.raises(UserError, match="ema_decay 1"):
        EMA(_weights(), 1.0)


def test_an_average_may_wait_on_the_host():
    here, there = EMA(_weights(), 0.9), EMA(_weights(), 0.9, Shelf(Delayed(0)))
    for i in range(1, 4):
        moved = {name: w + i for name, w in _weights().items()}
        here.update(moved)
        there.begin()  # out of memory, say: the step is done again
        there.begin()
        for name, w in moved.items():  # as they step
            there.take({name: w})
        there.finish(moved)
    for name, average in here.state().items():
        assert torch.equal(there.state()[name], average)
    again = there.anew(_weights())
    again.load(here.state())
    with again.applied(weights := _weights()):
        assert all(torch.equal(w, here.average[name]) for name, w in weights.items())
