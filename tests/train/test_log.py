"""The curve of a run's loss is drawn when the run has ended."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from training import config

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.train import run


def test_a_run_draws_its_curve(model: Path, images: Path, tmp_path: Path) -> None:
    settings = config(
        pretrained_model_name_or_path=str(model), output_dir=str(tmp_path / "out"), output_name="me",
        max_train_steps=2, network_dim=2,
    )  # fmt: skip
    data = DatasetConfig(subsets=(SubsetConfig(image_dir=str(images)),), resolution=(64, 64))
    run.train(settings, "network", (data,))
    with Image.open(tmp_path / "out" / "me-loss.png") as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 20) or []) > 2
