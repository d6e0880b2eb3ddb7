"""The curve of a run's loss is drawn when the run has ended; trackers are started as asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from training import config

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.errors import UserError
from sfumato.train import log, run


def test_a_run_draws_its_curve(model: Path, images: Path, tmp_path: Path) -> None:
    settings = config(
        pretrained_model_name_or_path=str(model), output_dir=str(tmp_path / "out"), output_name="me",
        max_train_steps=2, network_dim=2,
    )  # fmt: skip
    data = DatasetConfig(subsets=(SubsetConfig(image_dir=str(images)),), resolution=(64, 64))
    run.train(settings, "network", (data,))
    with Image.open(tmp_path / "out" / "me-loss.png") as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 20) or []) > 2


def test_trackers_are_started_with_what_their_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    wandb = SimpleNamespace(init=lambda **given: started.update(given) or SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(log, "find_spec", lambda name: name)
    file = tmp_path / "trackers.toml"
    file.write_text('[wandb]\nentity = "us"\nname = "third"\n')
    settings = config(
        output_dir=str(tmp_path), output_name="me", log_with="wandb", log_tracker_config=str(file), log_tracker_name="p"
    )
    log.check(settings.log)
    with log.Log(settings, 0, {"seed": 3}):
        assert started == {"config": {"seed": 3}, "project": "p", "name": "third", "entity": "us"}
    file.write_text("[tensorboard]\nflush_secs = 3\n")
    with pytest.raises(UserError, match=r"trackers.toml: tensorboard: expected a table .* log_with wandb: \[wandb\]"):
        log.check(settings.log)
