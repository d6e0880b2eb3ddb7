"""Optimizers by kohya's names."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from sfumato.config import OptimizerConfig
from sfumato.errors import UserError
from sfumato.optim import build
from sfumato.optim.groups import Group


def _groups(lr: float = 0.01) -> list[Group]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return [Group(name="denoiser", lr=lr, parameters=list(net.parameters()))]


def _make(kind: str, *args: str, lr: float = 0.01) -> torch.optim.Optimizer:
    return build.optimizer(OptimizerConfig(optimizer_type=kind, optimizer_args=args, learning_rate=lr), _groups(lr))


def _descend(optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return parameters


WITHOUT_EXTRAS = [name for name, path in build.NAMES.items() if not path.startswith("bitsandbytes")]


@pytest.mark.parametrize("name", [*WITHOUT_EXTRAS, "adamw", "Adam", "CAME", "torch.optim.RMSprop", "pytorch_optimizer.Tiger"])
def test_every_name_moves_the_weights_and_resumes(name):
    start = [p.detach().clone() for p in _groups()[0].parameters]
    lr = 1.0 if name.startswith(("DAdapt", "Prodigy")) else 0.01
    first = _make(name, lr=lr)
    moved = _descend(first)
    assert any(not torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    second = _make(name, lr=lr)
    for p, value in zip([p for g in second.param_groups for p in g["params"]], moved, strict=True):
        p.data.copy_(value)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(_descend(first), _descend(second), strict=True))


@pytest.mark.parametrize(
    ("name", "args", "same"),
    [
        ("AdamW", ("weight_decay=0.1", "betas=(0.8, 0.9)"), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))),
        ("SGDNesterov", (), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
        ("SGDNesterov", ("momentum=0.5",), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, nesterov=True)),
        ("torch.optim.Adam", ("amsgrad=True",), lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True)),
    ],
)
def test_equals_torch(name, args, same):
    mine = _descend(_make(name, *args))
    other = _descend(same(_groups()[0].parameters))
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_adafactor_with_a_given_rate_equals_transformers():
    from transformers.optimization import Adafactor

    args = ("scale_parameter=False", "relative_step=False", "warmup_init=False")
    other = Adafactor(_groups()[0].parameters, lr=0.01, scale_parameter=False, relative_step=False, warmup_init=False)
    assert all(torch.equal(a, b) for a, b in zip(_descend(_make("AdaFactor", *args)), _descend(other), strict=True))


def test_rates_as_they_act(caplog):
    adafactor = _make("AdaFactor")
    assert "relative_step" in caplog.text
    _descend(adafactor, 3)
    assert build.rates(adafactor) == [0.01]
    prodigy = _make("Prodigy", lr=1.0)
    _descend(prodigy, 3)
    assert build.rates(prodigy) == [prodigy.param_groups[0]["d"]]
    assert build.rates(_make("AdamW")) == [0.01]


def test_a_low_rate_for_prodigy_is_told(caplog):
    _make("Prodigy", lr=1e-4)
    assert "1.0 is usual" in caplog.text


def test_prodigyopts_spellings_are_known():
    optimizer = _make("Prodigy", "decouple=True", "use_bias_correction=True", "d_coef=2.0", lr=1.0)
    assert optimizer.defaults["weight_decouple"] is True
    assert optimizer.defaults["bias_correction"] is True


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_a_missing_library_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(UserError, match=r"pip install 'sfumato\[bitsandbytes\]'"):
        _make(name)


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("AdamX", (), "'AdamX' is not known.*did you mean 'AdamW'"),
        ("nothing.at.All", (), "needs the module 'nothing.at'"),
        ("torch.optim.AdamZ", (), "torch.optim has no 'AdamZ'; did you mean"),
        ("AdamW", ("weight_decy=0.1",), "no argument 'weight_decy'.*did you mean 'weight_decay'"),
        ("Prodigy", ("d_coeff=2",), "did you mean 'd_coef'"),
        ("AdamW", ("weight_decay",), "expected key=value"),
        ("AdamW", ("weight_decay=much",), "expected key=value with a Python value"),
        ("AdamW", ("weight_decay=-1",), "Invalid weight_decay"),
        ("AdamW", ("lr=1",), "set learning_rate instead"),
    ],
)
def test_mistakes(name, args, says):
    with pytest.raises(UserError, match=says):
        _make(name, *args)


def test_schedule_free_weights_to_use_and_to_train():
    parameter = torch.nn.Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    config = OptimizerConfig(optimizer_type="AdamWScheduleFree", learning_rate=0.01)
    optimizer = build.optimizer(config, [Group(name="denoiser", lr=0.01, parameters=[parameter])])
    _descend(optimizer)
    trained = parameter.detach().clone()
    with build.evaluating(optimizer):
        assert (parameter - trained).abs().max() > 1e-4
    assert torch.equal(parameter, trained)
    with pytest.raises(UserError, match="full_bf16"):
        build.in_low_bits(optimizer, seed=0)


def test_evaluating_leaves_others_alone():
    optimizer = _make("AdamW")
    parameters = _descend(optimizer)
    before = [p.detach().clone() for p in parameters]
    with build.evaluating(optimizer):
        assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
