"""Every family that has ControlNets trains them: they alone change, a saved one says what the trained one said, and a resumed
training goes on as if it had not stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import make_images
from runs.test_families import changed, configured, says, states, trained
from tinies.cases import Case, Files, cases
from torch import Tensor

from sfumato import families
from sfumato.formats.files import read_header
from sfumato.models.base import Models
from sfumato.models.controlled import Controlled, read_net
from sfumato.train import dist, loop, run

CASES = {case.family: case for case in reversed(cases()) if families.family(case.family).control}
"""One of each family: what differs within one is compared in `tests/families/`."""
STEPS = 5
"""The doors open in the first; what is behind two of them has a gradient from the third on."""
SETTINGS: dict[str, Any] = {
    "max_train_steps": STEPS,
    "save_every_n_steps": 3,
    "save_state": True,
    "control_net_lr": 2e-3,
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def files(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return case.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in `images`, and others that they follow in `follow`."""
    where = tmp_path_factory.mktemp("dataset")
    shutil.copytree(make_images(where), where / "follow", ignore=shutil.ignore_patterns("*.txt"))
    return where


def prepared(case: Case, files: Files, images: Path, out: Path, **settings: Any) -> loop.Run:
    made, (data,) = configured(case, files, images / "images", out, "controlnet", **SETTINGS, **settings)
    (subset,) = data.subsets
    pairs = replace(subset, conditioning_data_dir=str(images / "follow"))
    return run.prepare(made, "controlnet", (replace(data, subsets=(pairs,)),), dist.world(), 0.0)


def weights(a_run: loop.Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in a_run.trainable.weights().items()}


def test_a_control_net_is_trained_alone(case: Case, files: Files, images: Path, tmp_path: Path) -> None:
    a_run = prepared(case, files, images, tmp_path / "out", gradient_checkpointing=True)
    models: Models = a_run.trainable.models  # type: ignore[attr-defined]
    nets, before = states(models), weights(a_run)
    trained(a_run)
    assert not changed(nets, states(models))
    after = weights(a_run)
    assert changed(before, after) == before.keys()
    result = tmp_path / "out" / "out.safetensors"
    a_run.save_result(result, a_run.step, 0)
    assert read_header(result).metadata["modelspec.architecture"].endswith("/controlnet")
    (follower,) = models.followers
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    follower.follow(image)
    wanted = says(models)
    a_run.trainable.remove()
    alone = says(models)
    assert (wanted - alone).abs().max() > 1e-4
    again = Controlled(models, read_net(models, str(result)))
    again.follow(image)
    torch.testing.assert_close(says(models), wanted, atol=1e-6, rtol=1e-6)
    again.remove()
    resumed = prepared(
        case,
        files,
        images,
        tmp_path / "again",
        resume=str(tmp_path / "out" / "out-step00000003-state"),
        gradient_checkpointing=True,
    )
    trained(resumed)
    assert not changed(after, weights(resumed))
    resumed.trainable.remove()
