"""What a step takes is known before it is done: a step traced from shapes alone against a step whose tensors are
counted."""

from __future__ import annotations

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

SETTINGS: dict[str, tuple[Method, dict[str, Any]]] = {
    "flux-dev": ("network", {}),
    "sd3-medium": (
        "network",
        {"gradient_checkpointing": True, "gradient_checkpointing_every": 2, "micro_batch": 1},
    ),
    "lumina2-2": ("network", {"quantize": "int8", "gradient_checkpointing": True, "mixed_precision": "bf16"}),
    "hunyuan_image-base": ("full", {"gradient_checkpointing": True, "optimizer_type": "AdamW"}),
}
"""Of each family; docs/memory.md has all of them for all, from benchmarks/predict.py."""
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.mark.parametrize("name", SETTINGS)
def test_predicted_is_what_is_taken(tmp_path: Path, name: str) -> None:
    (method, settings), case = SETTINGS[name], next(case for case in cases() if case.name == name)
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
    predicted = forecast.of(forecast.now()).device
    assert predicted == pytest.approx(measure.peak(a_run), rel=0.05)
