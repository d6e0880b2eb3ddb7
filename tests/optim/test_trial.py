"""What is wrong with an optimizer or a schedule is found without a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.config import OptimizerConfig
from sfumato.errors import UserError
from sfumato.optim.groups import Group
from sfumato.optim.trial import for_length, stand_in, state_bytes, trial


def _tried(steps=100, rates=None, **fields):
    groups = [stand_in(name, lr) for name, lr in (rates or {"denoiser": 1e-4}).items()]
    return trial(OptimizerConfig(**fields), groups, steps=steps)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"optimizer_args": ("weight_decy=1",)}, "did you mean 'weight_decay'"),
        ({"optimizer_type": "LBFGS"}, "cannot make a plain step"),
        ({"optimizer_type": "SparseAdam"}, "cannot make a plain step"),
        ({"optimizer_type": "pytorch_optimizer.AdaHessian"}, "cannot make a plain step"),
        ({"optimizer_type": "pytorch_optimizer.AdaShift"}, "state can be saved"),
        ({"optimizer_type": "pytorch_optimizer.SAM"}, "base_optimizer"),
        ({"optimizer_type": "nothing.at.All"}, "cannot be imported"),
        (
            {"optimizer_type": "AdaFactor", "optimizer_args": ("relative_step=False",), "lr_scheduler": "adafactor"},
            "relative_step=True",
        ),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("0",)}, "expected key=value"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 80, "lr_decay_steps": 30},
            "more than the 100 steps",
        ),
    ],
)
def test_what_cannot_work_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        _tried(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"optimizer_type": "AdaFactor", "lr_scheduler": "cosine"}, "lr_scheduler cosine does not act"),
        (
            {
                "optimizer_type": "AdaFactor",
                "lr_scheduler_type": "CosineAnnealingLR",
                "lr_scheduler_args": ("T_max=5",),
            },
            "does not act",
        ),
        (
            {"optimizer_type": "AdaFactor", "rates": {"denoiser": 1e-3, "clip_l": 5e-4}},
            r"0\.001 \(denoiser\), 0\.0005 \(clip_l\) does not act",
        ),
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine"},
            "goes without; a warm-up goes by optimizer_args warmup_steps=",
        ),
        (
            {"optimizer_type": "AdamWScheduleFree", "optimizer_args": ("warmup_steps=200",)},
            "warmup_steps: the warm-up takes 200 steps",
        ),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 500}, "takes 500 steps and the run has 100"),
        ({"optimizer_type": "Prodigy"}, r"; 0\.0001 is low, 1\.0 is usual"),
        (
            {"optimizer_type": "Prodigy", "rates": {"denoiser": 1.0, "clip_l": 0.5}},
            r"of 1 \(denoiser\), 0\.5 \(clip_l\) it is the first",
        ),
    ],
)
def test_what_does_not_act_is_reported(fields, says):
    import re

    assert any(re.search(says, notice) for notice in _tried(**fields).notices)


@pytest.mark.parametrize("kind", ["AdamW", "Prodigy", "AdaFactor", "AdamWScheduleFree"])
def test_the_usual_gives_no_notice_but_of_what_was_set(kind):
    """A rate that is not used is not spoken of: learning_rate is low here, unet_lr is what acts."""
    groups = [stand_in("denoiser", 1.0)]
    args = ("relative_step=False", "scale_parameter=False") if kind == "AdaFactor" else ()
    config = OptimizerConfig(optimizer_type=kind, optimizer_args=args, learning_rate=1e-4, unet_lr=1.0)
    assert not trial(config, groups, steps=100).notices


def test_a_length_that_images_decide_is_looked_at_later():
    config = OptimizerConfig(lr_scheduler="warmup_stable_decay", lr_warmup_steps=80, lr_decay_steps=30)
    assert not trial(config, [stand_in("denoiser", 1e-4)]).notices
    with pytest.raises(UserError, match="more than the 100 steps"):
        for_length(config, 100)
    assert "run has 50" in for_length(OptimizerConfig(lr_scheduler="linear", lr_warmup_steps=80), 50)[0]


def test_the_weights_of_the_run_are_not_touched():
    weights = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]
    group = Group(name="denoiser", lr=1e-4, parameters=weights, plus=weights[1:2], loraplus_ratio=4.0)
    tried = trial(OptimizerConfig(), [group])
    assert [g["name"] for g in tried.optimizer.param_groups] == ["denoiser", "denoiser.plus"]
    assert all((p == 1).all() and p.grad is None for p in group.parameters)


@pytest.mark.parametrize(("name", "expected"), [("AdamW", 8), ("Lion", 4), ("SGDNesterov", 4), ("AdaFactor", 0.1)])
def test_bytes_of_the_state(name, expected):
    assert state_bytes(OptimizerConfig(optimizer_type=name)) == pytest.approx(expected, abs=0.1)
