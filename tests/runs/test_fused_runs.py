"""Weights that step in the backward pass, and optimizers whose state waits on the host: the numbers are the plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs.test_same import assert_same, stop_after
from training import Train, config

from sfumato.errors import UserError
from sfumato.formats.files import load
from sfumato.train import fusing
from sfumato.train.check import check

SETTINGS: dict[str, Any] = {"cache_latents": True, "max_grad_norm": 0.1, "ema_decay": 0.5, "lr_scheduler": "cosine"}


def _numbers(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    log = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return load(folder / "out.safetensors"), [line[name] for line in log for name in ("loss", "grad_norm")]


@pytest.mark.parametrize(
    ("method", "how", "others"),
    [
        (
            "network",
            {"fused_backward_pass": True, "fused_clipping": "two_passes"},
            {
                "network_args": ("ggpo_sigma=0.03", "ggpo_beta=0.01", "rank_dropout=0.2"),
                "stop_text_encoder_training": 1,
                "scale_weight_norms": 0.05,
            },
        ),
        (
            "full",
            {"blockwise_fused_optimizers": True, "optimizer_state_on_cpu": True},
            {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "train_text_encoder": True},
        ),
    ],
    ids=["network", "full"],
)
def test_equals_the_plain_run(train: Train, method: Any, how: dict[str, Any], others: dict[str, Any]) -> None:
    settings = {**SETTINGS, "max_train_steps": 3, **others}
    plain, fused = _numbers(train("plain", method, **settings)), _numbers(train("fused", method, **settings, **how))
    assert fused[1] == pytest.approx(plain[1], rel=1e-4)
    for name, t in plain[0].items():
        torch.testing.assert_close(fused[0][name], t, rtol=1e-4, atol=2e-6)


def test_resuming_equals_going_on(train: Train) -> None:
    """With all that a state must hold for it: the last norm, what rounding took away, moments on the host."""
    settings = SETTINGS | {
        "method": "full", "lr_scheduler": "constant", "full_bf16": True, "kahan_summation": True, "mixed_precision": "bf16",
        "fused_backward_pass": True, "fused_clipping": "delayed", "optimizer_state_on_cpu": True,
    }  # fmt: skip
    whole = train("whole", max_train_steps=4, **settings)
    stop_after(train, 2, **settings)
    train("parts", max_train_steps=4, resume="auto", **settings)
    assert_same(whole / "out.safetensors", whole.parent / "parts" / "out.safetensors")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optimizer_type": "Prodigy", "optimizer_state_on_cpu": True}, "Prodigy needs the state of all weights"),
        ({"fused_backward_pass": True}, "several processes"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], says: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=says):
        check(config(pretrained_model_name_or_path=str(model), output_dir=str(tmp_path), **settings), "network", ())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "gradients wait in the CPU's memory (1.0 GiB) until their norm is known (max_grad_norm 1)"),
        (
            {"fused_clipping": "two_passes"},
            "gradients are made twice, as no weight may step until their norm is known (max_grad_norm 1)",
        ),
        ({"fused_clipping": "delayed"}, "max_grad_norm 1 goes by the norm of the step before"),
        ({"max_grad_norm": 0.0}, "gradients are freed as they come"),
        (
            {"mixed_precision": "fp16", "max_grad_norm": 0.0},
            "gradients wait in the CPU's memory (1.0 GiB) until it is sure that none overflows in fp16",
        ),
        (
            {"optimizer_type": "Prodigy", "max_grad_norm": 0.0},
            "gradients wait in the CPU's memory (1.0 GiB) until Prodigy steps, which needs all of them",
        ),
    ],
)
def test_says_what_becomes_of_gradients(settings: dict[str, Any], says: str) -> None:
    made = config(fused_backward_pass=True, **settings)
    alone = made.optimizer.optimizer_type != "Prodigy"
    assert fusing._gradients(made, alone, 2**30) == f"fused_backward_pass: {says}"
