"""Optimizers by kohya's names."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

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


WITHOUT_EXTRAS = [name for name, path in build.NAMES.items() if not path.startswith(("bitsandbytes", "dadaptation"))]


@pytest.mark.parametrize(
    "name", [*WITHOUT_EXTRAS, "adamw", "Adam", "CAME", "torch.optim.RMSprop", "pytorch_optimizer.Tiger"]
)
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
        (
            "AdamW",
            ("weight_decay=0.1", "betas=(0.8, 0.9)"),
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)),
        ),
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


def test_rates_as_they_act():
    adafactor = _make("AdaFactor")
    _descend(adafactor, 3)
    assert build.rates(adafactor) == [0.01]
    prodigy = _make("Prodigy", lr=1.0)
    _descend(prodigy, 3)
    assert build.rates(prodigy) == [prodigy.param_groups[0]["d"]]
    assert build.rates(_make("AdamW")) == [0.01]


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
        ("AdamW", ("weight_decay=0.1 eps=1e-7",), "each needs its own: weight_decay=0.1 eps=1e-7 on the command line"),
        ("AdamW", ("betas=0.9, 0.99, eps=1e-7",), "each needs its own"),
        ("Prodigy", ("decouple=False", "weight_decay=0.1"), "would decay nothing"),
        ("builtins.dict", (), "expected the class of an optimizer"),
        ("os.getcwd", (), "expected the class of an optimizer"),
        ("torch.optim.Optimizer", (), "expected the class of an optimizer"),
        ("torch.nn.Linear", ("in_features=2",), "expected the class of an optimizer"),
    ],
)
def test_mistakes(name, args, says):
    with pytest.raises(UserError, match=says):
        _make(name, *args)


def test_nothing_is_called_that_is_not_an_optimizer(monkeypatch):
    called = []
    monkeypatch.setattr("os.getcwd", lambda *args, **kwargs: called.append(args))
    monkeypatch.setattr("collections.Counter", lambda *args, **kwargs: called.append(args))
    for path in ("os.getcwd", "collections.Counter"):
        with pytest.raises(UserError):
            _make(path, "trust_remote_code=True")
    assert not called


def test_one_search_for_the_rate_means_one_rate():
    groups = [
        Group(name=n, lr=lr, parameters=[nn.Parameter(torch.ones(3, 3))])
        for n, lr in (("denoiser", 1.0), ("clip_l", 0.25))
    ]
    optimizer = build.optimizer(OptimizerConfig(optimizer_type="Prodigy", learning_rate=1.0), groups)
    a, b = (p.detach().clone() for p in _descend(optimizer))
    fast, slow = build.rates(optimizer)
    assert fast == slow
    assert (a - 1).norm() == pytest.approx((b - 1).norm(), rel=0.5)


def _small_weights() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(0.1 * torch.randn(3, 4, generator=g)), nn.Parameter(torch.zeros(2, 3))]


@pytest.mark.parametrize(
    "case", json.loads((Path(__file__).parents[1] / "fixtures/optimizers.json").read_text()), ids=lambda c: c["name"]
)
def test_20_steps_equal_those_of_the_libraries_that_kohyas_names_mean(case):
    """The numbers were made by dadaptation 3.2, prodigyopt 1.1.2, lion-pytorch 0.2.5, schedulefree 1.4.1 and came-pytorch 0.1.3."""
    if build.NAMES.get(case["name"], "").startswith("dadaptation"):
        pytest.importorskip("dadaptation")
    down, up = weights = _small_weights()
    start = torch.cat([p.detach().flatten().clone() for p in weights])
    group = Group(name="denoiser", lr=case["lr"], parameters=weights)
    config = OptimizerConfig(optimizer_type=case["name"], optimizer_args=tuple(case["args"]), learning_rate=case["lr"])
    optimizer = build.optimizer(config, [group])
    build.training(optimizer)
    g = torch.Generator().manual_seed(1)
    goal = torch.randn(2, 4, generator=g)
    for _ in range(20):
        optimizer.zero_grad()
        x = torch.randn(5, 4, generator=g)
        ((x @ down.T @ up.T - x @ goal.T) ** 2).mean().backward()
        optimizer.step()
    with build.evaluating(optimizer):
        found, expected = torch.cat([p.detach().flatten() for p in weights]), torch.tensor(case["weights"])
    assert (found - expected).norm() <= 1e-3 * (expected - start).norm()


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


def test_torchs_optimizers_step_in_one_kernel_unless_told_otherwise():
    def made(name, *args):
        config = OptimizerConfig(optimizer_type=name, optimizer_args=args, learning_rate=0.01)
        return build.optimizer(config, _groups(), fused=True)

    fused = made("AdamW", "weight_decay=0.1")
    assert fused.defaults["fused"]
    for a, b in zip(_descend(fused), _descend(_make("AdamW", "weight_decay=0.1")), strict=True):
        torch.testing.assert_close(a, b)
    assert not made("AdamW", "foreach=True").defaults["fused"]
    _descend(made("Lion"))
    _descend(made("torch.optim.NAdam"))
