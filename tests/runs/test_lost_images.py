"""Images that are deleted or replaced while a run goes on do not end it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from training import Train

from sfumato.train import loop


def test_a_image_deleted_and_one_replaced_while_training_are_reported_and_the_run_goes_on(
    train: Train, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = loop._optimizer_step

    def losing(a_run: loop.Run, *args: Any) -> Any:
        if a_run.step == 1:
            (images / "1.png").unlink(missing_ok=True)
            Image.new("RGB", (64, 64)).save(images / "3.png")
        return step(a_run, *args)

    monkeypatch.setattr(loop, "_optimizer_step", losing)
    folder = train("a", max_train_epochs=3)
    text = " ".join(capsys.readouterr().err.split())
    for name, why in (("1.png", "does not exist"), ("3.png", "has changed")):
        assert text.count(f"{name}: ") == 1 and why in text
    losses = [json.loads(line)["loss"] for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len(losses) == 9 and all(math.isfinite(loss) for loss in losses)
    assert (folder / "out.safetensors").exists()
