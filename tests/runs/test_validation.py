"""Held-out images are measured on the same noise each time, and training does not notice."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_fixtures import make_images
from runs.test_families import configured
from tinies.cases import Files, cases
from tiny import short_sd1
from training import config

from sfumato import families
from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.errors import UserError
from sfumato.formats.files import load, read_header
from sfumato.train import dist, loop, run
from sfumato.train.trainables import MAKERS

FOLDERS = ("images", "other")
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
    train(there, "with", validate_every_n_steps=2, **much)
    for name in ("out.safetensors", "out-step00000002.safetensors", "out-state/weights.safetensors"):
        assert same(there / "without" / name, there / "with" / name)
    state = str(there / "with" / "out-step00000002-state")
    train(there, "resumed", validate_every_n_steps=2, resume=state, **(much | {"save_state": False}))
    assert same(there / "without" / "out.safetensors", there / "resumed" / "out.safetensors")
    assert [line["step"] for line in lines(there / "with")] == [0, 2, 4]
    assert lines(there / "resumed") == lines(there / "with")[-1:]


@pytest.fixture(scope="module")
def ready(there: Path) -> loop.Run:
    """A run that is ready for its first step; its captions are encoded in each step."""
    return prepare(there, "ready", method="full", train_text_encoder=True, cache_latents=False, flip_aug=True)


def prepare(there: Path, name: str, method: Any = "network", *, flip_aug: bool = False, **changed: Any) -> loop.Run:
    changed = {"max_train_steps": 1, "mixed_precision": "bf16", **changed}
    if method == "full":
        changed |= {"network_dim": None, "network_dropout": None, "network_train_unet_only": False}
    a_run = run.prepare(options(there, name, **changed), method, data(there, flip_aug=flip_aug), ALONE, 0.0)
    with a_run.log:  # type: ignore[union-attr]
        a_run.log = None
    return a_run


def measured(a_run: loop.Run, most: int | None = None) -> torch.Tensor:
    with loop.evaluation_weights(a_run):
        found = a_run.validation.measure(most)  # type: ignore[union-attr]
    assert found.held_out.shape == found.trained.shape == (2, 8)
    return torch.cat([found.held_out, found.trained])


def test_two_measurements_with_no_step_between_are_equal(ready: loop.Run) -> None:
    """And the global source of randomness is not touched; a step moves every number; every level has its own noise."""
    state = torch.get_rng_state()
    before, again = measured(ready), measured(ready)
    assert torch.equal(before, again) and torch.equal(torch.get_rng_state(), state)
    assert before.isfinite().all() and before.unique().numel() == before.numel()
    torch.testing.assert_close(measured(ready, 1), before, rtol=1e-2, atol=1e-3)  # in parts of one sample
    assert loop.train(ready)
    assert (measured(ready) != before).all()


def test_caches_change_nothing_but_rounding(there: Path) -> None:
    settings = {"mixed_precision": "no", "flip_aug": True}
    live = measured(prepare(there, "live", cache_latents=False, **settings))
    cached = measured(prepare(there, "cached", cache_text_encoder_outputs=True, **settings))
    torch.testing.assert_close(cached, live, rtol=2e-3, atol=1e-3)


def test_the_best_result_is_kept_and_told(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a rate that goes through the roof, the best is not the last; what is kept is what was saved then."""
    steps = {"validate_every_n_steps": 1, "save_every_n_steps": 1, "max_train_steps": 3, "learning_rate": 0.3}
    out = train(there, "best", save_best=True, max_validation_steps=1, **steps)
    found = {line["step"]: line["loss/validation/mean"] for line in lines(out)}
    assert list(found) == [0, 1, 2, 3] and min(found[step] for step in (1, 2)) < found[3]
    best = min((1, 2, 3), key=found.__getitem__)
    assert same(out / "out-best.safetensors", out / f"out-step{best:08d}.safetensors")
    fields = read_header(out / "out-best.safetensors").metadata
    wanted = {"num_validation_images": 2, "validation_split": 1.0, "validation_seed": 42, "validate_every_n_steps": 1}
    assert {name: fields[f"ss_{name}"] for name in wanted} == {name: str(value) for name, value in wanted.items()}
    assert found[0] <= found[best] or f"recommended: step {best}" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"out-best\.safetensors"):  # which a second run would start from and write over
        train(there, "best", save_best=True, network_weights=str(out / "out-best.safetensors"), **steps)


def test_an_image_that_is_gone_is_left_out_and_no_training_ends_for_it(there: Path, tmp_path: Path) -> None:
    shutil.copytree(there / "other", tmp_path / "other")
    folders = data(there, listed=False)[0].subsets
    other = SubsetConfig(image_dir=str(tmp_path / "other"), validation_split=1.0)
    datasets = (DatasetConfig(subsets=(*folders, other), resolution=(64, 64), batch_size=2),)
    settings = options(there, "gone", cache_latents=False, max_train_steps=1)
    a_run = run.prepare(settings, "network", datasets, ALONE, 0.0)
    (tmp_path / "other" / "0.png").unlink()
    with a_run.log or nullcontext():
        found = a_run.validation.measure(None)  # type: ignore[union-attr]
        assert found.held_out[0].isnan().all() and found.held_out[1].isfinite().all() and math.isfinite(found.mean)
        assert found.details()["held_out"][0] is None and json.loads(json.dumps(found.scalars()))
        assert loop.train(a_run)


FOLLOWING = {"controlnet": "control", "lllite": "lllite"}
"""What follows images -> what a family says of it."""


@pytest.mark.parametrize("method", [method for method in MAKERS if method != "full"])
def test_every_trainable_is_measured(method: Any, there: Path, tmp_path: Path) -> None:
    """On the first family that has it: twice alike, and otherwise after two steps. What is followed and what is learnt is
    there of held-out images too."""
    having = [case for case in cases() if getattr(families.family(case.family), FOLLOWING.get(method, "name"))]
    case = next((case for case in having if case.family == "sd"), having[0])
    files = Files(model=there / "model.safetensors") if case.family == "sd" else case.write(tmp_path)
    word = {"token_string": "hoge", "use_object_template": True} if method == "embedding" else {}
    folders = [SubsetConfig(image_dir=str(there / name), validation_split=float(name == "other")) for name in FOLDERS]
    if method in FOLLOWING:
        folders = [replace(folder, conditioning_data_dir=folder.image_dir) for folder in folders]
    made, (dataset,) = configured(case, files, there / "images", tmp_path, method, learning_rate=0.1, **word)
    dataset = replace(dataset, subsets=tuple(folders), resolution=(64, 64), batch_size=4)
    a_run = run.prepare(made, method, (dataset,), ALONE, 0.0)
    with a_run.log or nullcontext():
        before = measured(a_run)
        assert torch.equal(measured(a_run), before) and before.isfinite().all()
        assert loop.train(a_run)
    assert (measured(a_run) != before).all()
    captions = [line for item in a_run.validation.plan.items for line in item.image.captions]  # type: ignore[union-attr]
    assert method != "embedding" or all("hoge" in line for line in captions)
