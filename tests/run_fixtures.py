"""Fixtures of whole runs: a tiny model, a few images, and a function that trains on them for a few steps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tiny
from PIL import Image
from training import Train, config

from sfumato.config import DatasetConfig, Method, SubsetConfig
from sfumato.train import log, run

CURVE = log.curve


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x single file of few blocks."""
    return tiny.short_sd1(tmp_path_factory.mktemp("model"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """See `make_images`."""
    return make_images(tmp_path)


def make_images(where: Path) -> Path:
    """Five images of 64 px with captions."""
    folder = where / "images"
    folder.mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}, red, blue")
    return folder


@pytest.fixture
def train(model: Path, images: Path, tmp_path: Path) -> Train:
    """Train with these flat options; returns the output folder."""

    def go(name: str, method: Method = "network", *, subset: dict[str, Any] | None = None, **options: Any) -> Path:
        settings = {
            "pretrained_model_name_or_path": str(model),
            "output_dir": str(tmp_path / name),
            "output_name": "out",
            "max_train_steps": 2,
            "learning_rate": 1e-3,
            "network_dim": 2,
            "network_alpha": 2.0,
            "seed": 7,
        }
        folder = SubsetConfig(**{"image_dir": str(images), **(subset or {})})
        data = DatasetConfig(subsets=(folder,), resolution=(64, 64), batch_size=2)
        # An eighth of a short run; tests/train/test_log.py has it, and a test may put another in its place.
        with patch.object(log, "curve") if log.curve is CURVE else nullcontext():
            run.train(config(**{**settings, **options}), method, (data,))
        return tmp_path / name

    return go
