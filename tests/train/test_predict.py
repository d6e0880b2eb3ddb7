"""What a step takes is known before it is done: a step traced from shapes alone against a step whose tensors are
counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import make_images
from runs.test_families import prepared
from tinies.cases import cases

from sfumato.config import Method
from sfumato.data.loader import StepBatches
from sfumato.train import loop, measure
from sfumato.train.fit import Forecast

FAMILIES = ("flux-dev", "sd3-medium", "lumina2-2", "hunyuan_image-base")
SETTINGS: dict[str, tuple[Method, dict[str, Any]]] = {
    "LoRA": ("network", {}),
    "LoRA, every 2nd block, half the batch": (
        "network",
        {"gradient_checkpointing": True, "gradient_checkpointing_every": 2, "micro_batch": 1},
    ),
    "LoRA, int8, all blocks, bf16": (
        "network",
        {"quantize": "int8", "gradient_checkpointing": True, "mixed_precision": "bf16"},
    ),
    "whole model, all blocks": ("full", {"gradient_checkpointing": True}),
}
WHOLE = "SFUMATO_PREDICT_ALL" in os.environ
"""One setting of each family is tried; all of all, for docs/memory.md, by
`SFUMATO_PREDICT_ALL=1 pytest tests/train/test_predict.py -n 0 -s`."""
ALL = [(f, s) for i, f in enumerate(FAMILIES) for j, s in enumerate(SETTINGS) if WHOLE or i == j]
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.mark.parametrize(("name", "setting"), ALL)
def test_predicted_is_what_is_taken(tmp_path: Path, name: str, setting: str) -> None:
    (method, settings), case = SETTINGS[setting], next(case for case in cases() if case.name == name)
    files, images = case.write(tmp_path / "model"), make_images(tmp_path)
    wanted = {"network_train_unet_only": method == "network", **CACHED, **settings, "simulate_vram": "1GB"}
    a_run = prepared(case, files, images, tmp_path / "out", method, **wanted)
    assert a_run.tracker and a_run.log
    with a_run.log, a_run.tracker:
        for step in a_run.loader.epoch(0):
            batches = list(step.batches)
            if len(batches[0]) == 2:  # the last one of an epoch is smaller
                for _ in range(2):  # the second one has the optimizer's state beside it
                    loop._optimizer_step(a_run, StepBatches(iter(batches), step.count, step.samples))
                break
    recovery: Any = a_run.recover
    forecast = Forecast(a_run.config, method, recovery.plan, a_run.plan, ("micro_batch",), card=False)
    predicted, taken = forecast.of(forecast.now()).device, measure.peak(a_run)
    print(f"| {name} | {setting} | {predicted / 2**20:.2f} | {taken / 2**20:.2f} | {predicted / taken - 1:+.1%} |")
    assert predicted == pytest.approx(taken, rel=0.05)
