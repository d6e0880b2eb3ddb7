"""Any optimizer on weights in bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sfumato.config import OptimizerConfig
from sfumato.optim import build
from sfumato.optim.groups import Group

NAMES = ["AdamW", "SGDNesterov", "Lion", "Prodigy", "AdaFactor", "DAdaptAdam"]


def _make(name: str, dtype: torch.dtype, size: int = 64) -> torch.optim.Optimizer:
    g = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size, 4, generator=g).to(dtype)) for _ in range(2)]
    config = OptimizerConfig(optimizer_type=name, learning_rate=1.0 if name in ("Prodigy", "DAdaptAdam") else 1e-3)
    made = build.optimizer(config, [Group(name="denoiser", lr=config.learning_rate, parameters=parameters)])
    return build.in_low_bits(made, seed=3) if dtype is torch.bfloat16 else made


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def _descend(optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for i in range(first, first + steps):
        for p in _parameters(optimizer):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_follows_fp32(name):
    low, high = _make(name, torch.bfloat16), _make(name, torch.float32)
    for p, q in zip(_parameters(low), _parameters(high), strict=True):
        q.data.copy_(p.data)
    _descend(low, 0, 10)
    _descend(high, 0, 10)
    for p, q in zip(_parameters(low), _parameters(high), strict=True):
        assert p.dtype is torch.bfloat16
        assert p.grad.dtype is torch.bfloat16
        torch.testing.assert_close(p.float(), q, atol=0.02, rtol=0.05)
    for state in low.state.values():
        floats = [t for t in state.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
        assert all(t.dtype is torch.float32 for t in floats)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_unbroken(name):
    whole = _make(name, torch.bfloat16)
    _descend(whole, 0, 3)
    half = _make(name, torch.bfloat16)
    for p, q in zip(_parameters(half), _parameters(whole), strict=True):
        p.data.copy_(q.data)
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert all(p.dtype is torch.bfloat16 for p in _parameters(half))
    _descend(whole, 3, 3)
    _descend(half, 3, 3)
    assert all(torch.equal(p, q) for p, q in zip(_parameters(whole), _parameters(half), strict=True))


@pytest.mark.parametrize("kahan", [False, True])
def test_small_steps_add_up(kahan):
    parameter = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = build.in_low_bits(torch.optim.SGD([parameter], lr=1e-4), seed=0, kahan=kahan)
    for _ in range(30):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    if kahan:  # what is not in the weights is in the state
        lost = optimizer.state[parameter]["rounding_error"]
        assert lost.dtype is torch.bfloat16
        torch.testing.assert_close(parameter.float() + lost.float(), torch.full((4000,), 1 - 30e-4), rtol=0, atol=1e-4)
        return
    assert parameter.float().mean().item() == pytest.approx(1 - 30e-4, abs=5e-4)
    # One step down is 1/256. The same chance at every step would take a few weights down all 30 times.
    assert parameter.float().min().item() >= 1 - 8 / 256


def test_weights_without_gradient_stay():
    optimizer = _make("AdamW", torch.bfloat16)
    first, second = _parameters(optimizer)
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, before)
    assert second.grad is None
    assert second.dtype is torch.bfloat16


def test_a_net_runs_between_the_steps():
    net = nn.Linear(4, 2).bfloat16()
    optimizer = build.in_low_bits(torch.optim.AdamW(net.parameters(), lr=1e-2), seed=0)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    losses = []
    for _ in range(40):
        optimizer.zero_grad(set_to_none=True)
        value = (net(x) - x[:, :2]).float().square().mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] / 2
