"""Learning-rate curves against those of transformers and diffusers."""

from __future__ import annotations

import diffusers.optimization as diffusers
import pytest
import torch
import transformers.optimization as transformers
from torch import nn

from sfumato.config import OptimizerConfig
from sfumato.errors import UserError
from sfumato.optim import build
from sfumato.optim.groups import Group
from sfumato.optim.schedules import CURVES, schedule, share

STEPS, WARMUP, RATE = 40, 7, 3e-4


def _optimizer(kind: str = "AdamW", *args: str, rate: float = RATE) -> torch.optim.Optimizer:
    groups = [
        Group(name=n, lr=lr, parameters=[nn.Parameter(torch.zeros(2))])
        for n, lr in (("denoiser", rate), ("clip_l", rate / 4))
    ]
    return build.optimizer(OptimizerConfig(optimizer_type=kind, optimizer_args=args, learning_rate=rate), groups)


def _walk(scheduler, optimizer) -> list[list[float]]:
    history = []
    for _ in range(STEPS + 3):
        history.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return history


def _mine(**fields) -> list[list[float]]:
    optimizer = _optimizer()
    return _walk(schedule(OptimizerConfig(learning_rate=RATE, **fields), optimizer, STEPS), optimizer)


CASES = [
    ({"lr_scheduler": "constant"}, lambda o: transformers.get_constant_schedule(o)),
    ({"lr_scheduler": "constant_with_warmup"}, lambda o: transformers.get_constant_schedule_with_warmup(o, WARMUP)),
    ({"lr_scheduler": "linear"}, lambda o: transformers.get_linear_schedule_with_warmup(o, WARMUP, STEPS)),
    ({"lr_scheduler": "linear"}, lambda o: diffusers.get_linear_schedule_with_warmup(o, WARMUP, STEPS)),
    ({"lr_scheduler": "cosine"}, lambda o: transformers.get_cosine_schedule_with_warmup(o, WARMUP, STEPS)),
    (
        {"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycles=1.5",)},
        lambda o: diffusers.get_cosine_schedule_with_warmup(o, WARMUP, STEPS, 1.5),
    ),
    (
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, WARMUP, STEPS, 3),
    ),
    (
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2},
        lambda o: diffusers.get_cosine_with_hard_restarts_schedule_with_warmup(o, WARMUP, STEPS, 2),
    ),
    (
        {"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0, "lr_scheduler_args": ("lr_end=1e-5",)},
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, WARMUP, STEPS, lr_end=1e-5, power=2.0),
    ),
    ({"lr_scheduler": "polynomial"}, lambda o: diffusers.get_polynomial_decay_schedule_with_warmup(o, WARMUP, STEPS)),
    ({"lr_scheduler": "inverse_sqrt"}, lambda o: transformers.get_inverse_sqrt_schedule(o, WARMUP)),
    (
        {"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 20},
        lambda o: transformers.get_inverse_sqrt_schedule(o, WARMUP, 20),
    ),
    (
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
        lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, STEPS, min_lr_rate=0.1),
    ),
    (
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": ("min_lr=1e-5",), "lr_scheduler_num_cycles": 2},
        lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, STEPS, 1.0, min_lr=1e-5),
    ),
    *(
        (
            {
                "lr_scheduler": "warmup_stable_decay",
                "lr_decay_steps": 10,
                "lr_scheduler_min_lr_ratio": 0.2,
                "lr_scheduler_args": (f"warmup_type='{shape}'", f"decay_type='{shape}'"),
            },
            lambda o, shape=shape: transformers.get_wsd_schedule(
                o, WARMUP, 10, STEPS, warmup_type=shape, decay_type=shape, min_lr_ratio=0.2
            ),
        )
        for shape in ("linear", "cosine", "1-sqrt")
    ),
    (
        {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": "25%"},
        lambda o: transformers.get_wsd_schedule(o, WARMUP, 10, STEPS),
    ),
    (
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='1:10,0.1:20,0.01:30,0.005'",)},
        lambda o: diffusers.get_piecewise_constant_schedule(o, "1:10,0.1:20,0.01:30,0.005"),
    ),
]


@pytest.mark.parametrize(
    ("fields", "oracle"), CASES, ids=lambda v: v.get("lr_scheduler") if isinstance(v, dict) else ""
)
def test_equals_the_library(fields, oracle):
    optimizer = _optimizer()
    expected = _walk(oracle(optimizer), optimizer)
    assert _mine(lr_warmup_steps=WARMUP, **fields) == [pytest.approx(lrs, rel=1e-12, abs=1e-20) for lrs in expected]


def test_every_curve_has_an_oracle():
    assert {fields["lr_scheduler"] for fields, _ in CASES} == CURVES.keys() - {"adafactor"}


def test_a_schedule_at_a_step_is_as_if_walked():
    walked = _mine(lr_scheduler="cosine", lr_warmup_steps=5)
    optimizer = _optimizer()
    made = schedule(OptimizerConfig(learning_rate=RATE, lr_scheduler="cosine", lr_warmup_steps=5), optimizer, STEPS)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a loaded optimizer state brings rates of its own
    made.to(17)
    assert [g["lr"] for g in optimizer.param_groups] == walked[17]
    made.step()
    assert [g["lr"] for g in optimizer.param_groups] == walked[18]


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0),
        (7, 7),
        ("7", 7),
        (0.1, 10),
        ("0.1", 10),
        ("10%", 10),
        (1, 1),
        (1.0, 1),
        ("100%", 100),
        ("1%", 1),
        (250, 250),
    ],
)
def test_share(value, steps):
    assert share("lr_warmup_steps", value, 100) == steps


@pytest.mark.parametrize("value", ["ten", "-1", -3, "120%", "nan", 1.5, "2.5"])
def test_share_refuses(value):
    with pytest.raises(UserError, match="lr_warmup_steps"):
        share("lr_warmup_steps", value, 100)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"lr_scheduler": "adafactor"}, "is for optimizer_type AdaFactor"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycle=2",)}, "did you mean 'num_cycles'"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "set one of lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "piecewise_constant"}, "set lr_scheduler_args step_rules"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='1;3'",)}, "do not go together"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 30, "lr_decay_steps": 20},
            "more than the 40 steps",
        ),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ("decay_type='sudden'",)},
            "'sudden' is not one of",
        ),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=1",)}, "is not above lr_end"),
        ({"lr_scheduler_type": "Nothing"}, "torch.optim.lr_scheduler has no 'Nothing'"),
        ({"lr_scheduler_type": "StepLR"}, "step_size"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "goes by the step"),
        ({"lr_scheduler_type": "builtins.dict"}, "a subclass of torch's LRScheduler"),
        ({"lr_scheduler_type": "os.getcwd"}, "a subclass of torch's LRScheduler"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("0",)}, "expected key=value"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("stepsize=1",)}, "did you mean 'step_size'"),
    ],
)
def test_mistakes(fields, says):
    with pytest.raises(UserError, match=says):
        _mine(**fields)


@pytest.mark.parametrize(("kind", "args"), [("AdamWScheduleFree", ()), ("AdaFactor", ())])
def test_optimizers_that_go_without_a_schedule_keep_their_rate(kind, args):
    for asked in ({"lr_scheduler": "cosine"}, {"lr_scheduler": "constant"}, {"lr_scheduler_type": "CosineAnnealingLR"}):
        optimizer = _optimizer(kind, *args)
        made = schedule(OptimizerConfig(optimizer_type=kind, **asked), optimizer, STEPS)
        made.to(STEPS // 2)
        assert [g["lr"] for g in optimizer.param_groups] == [RATE, RATE / 4]


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "torch.optim.lr_scheduler.CosineAnnealingLR"])
def test_a_class_of_torch(name):
    """Its formula goes from one rate to the next, so playing it from a loaded rate would be wrong."""
    optimizer = _optimizer()
    expected = _walk(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS), optimizer)
    fields = {"lr_scheduler_type": name, "lr_scheduler_args": (f"T_max={STEPS}",)}
    assert _mine(**fields) == expected
    optimizer = _optimizer()
    made = schedule(OptimizerConfig(learning_rate=RATE, **fields), optimizer, STEPS)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    made.to(17)
    assert [g["lr"] for g in optimizer.param_groups] == expected[17]
