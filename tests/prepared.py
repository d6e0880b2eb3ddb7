"""A tiny run put together up to its first step, for tests of what is checked before, and of single steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from training import config

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.train import dist, run

OPTIONS: dict[str, Any] = {
    "output_name": "out",
    "max_train_steps": 2,
    "learning_rate": 1e-3,
    "network_dim": 2,
    "seed": 7,
    "optimizer_args": ("weight_decay=0.01",),
    "network_train_unet_only": True,
    "save_state": True,
}


def folder(where: Path) -> Path:
    """`model.safetensors` and two `images` in it."""
    tiny.short_sd1(where)
    (where / "images").mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64)).save(where / "images" / f"{i}.png")
        (where / "images" / f"{i}.txt").write_text(f"picture {i}")
    return where


def options(where: Path, **changed: Any) -> Any:
    """The config of a run there, with results in `first`."""
    settings = {"pretrained_model_name_or_path": str(where / "model.safetensors"), "output_dir": str(where / "first")}
    return config(**{**OPTIONS, **settings, **changed})


def data(where: Path, **changed: Any) -> tuple[DatasetConfig, ...]:
    """Its images, one batch an epoch."""
    return (
        DatasetConfig(
            subsets=(SubsetConfig(image_dir=str(where / "images"), **changed),), resolution=(64, 64), batch_size=2
        ),
    )


def prepare(where: Path, method: Any = "network", subset: dict[str, Any] | None = None, **changed: Any) -> Any:
    """The run, ready for its first step; its log is closed."""
    a_run = run.prepare(
        options(where, **changed), method, data(where, **(subset or {})), dist.World(0, 1, torch.device("cpu")), 0.0
    )
    with a_run.log:
        a_run.log, log = None, a_run.log
    assert log
    return a_run
