"""Held-out images are measured on the same noise each time, and training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_fixtures import make_images
from tiny import short_sd1
from training import config

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.formats.files import load
from sfumato.train import dist, run

ALONE = dist.World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, five images, and two more in `other`."""
    where = tmp_path_factory.mktemp("validation")
    short_sd1(where)
    make_images(where)
    (where / "other").mkdir()
    for i in range(2):
        Image.radial_gradient("L").rotate(40 * i).resize((64, 64)).convert("RGB").save(where / "other" / f"{i}.png")
        (where / "other" / f"{i}.txt").write_text(f"gradient {i}, grey")
    return where


def data(there: Path, *, listed: bool = True, **subset: Any) -> tuple[DatasetConfig, ...]:
    folders = [SubsetConfig(image_dir=str(there / "images"), **subset)]
    other = SubsetConfig(image_dir=str(there / "other"), validation_split=1.0)
    return (DatasetConfig(subsets=(*folders, *[other] * listed), resolution=(64, 64), batch_size=2),)


def options(there: Path, name: str, **changed: Any) -> Any:
    settings = {
        "pretrained_model_name_or_path": str(there / "model.safetensors"),
        "output_dir": str(there / name),
        "output_name": "out",
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "network_dim": 2,
        "network_dropout": 0.2,
        "network_train_unet_only": True,
        "seed": 7,
        "cache_latents": True,
    }
    return config(**{**settings, **changed})


def train(there: Path, name: str, method: Any = "network", *, datasets: Any = None, **changed: Any) -> Path:
    run.train(options(there, name, **changed), method, datasets or data(there))
    return there / name


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in found if "validation" in line]


def same(a: Path, b: Path) -> bool:
    one, other = load(a), load(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_does_not_notice(there: Path) -> None:
    """Results and states are bit for bit those of a training without held-out images, resumed as well; and so is what
    is measured."""
    much = {"save_state": True, "ema_decay": 0.9, "optimizer_type": "ScheduleFreeAdamW", "save_every_n_steps": 2}
    train(there, "without", datasets=data(there, listed=False), **much)
    train(there, "with", validate_every_n_steps=1, **much)
    for name in ("out.safetensors", "out-step00000002.safetensors", "out-state/weights.safetensors"):
        assert same(there / "without" / name, there / "with" / name)
    train(there, "resumed", validate_every_n_steps=1, max_train_steps=2, **much)
    log = (there / "resumed" / "out.jsonl").read_text(encoding="utf-8")
    train(there, "resumed", validate_every_n_steps=1, resume="auto", **much)
    assert same(there / "without" / "out.safetensors", there / "resumed" / "out.safetensors")
    assert lines(there / "resumed") == lines(there / "with")
    assert (there / "resumed" / "out.jsonl").read_text(encoding="utf-8").startswith(log)
