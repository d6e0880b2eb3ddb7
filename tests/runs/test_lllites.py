"""Every family that has ControlNet-LLLites trains them: they alone change, a saved one says what the trained one said, and a
resumed training goes on as if it had not stopped."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oncard import CARD, batch_of, on_card, step
from run_fixtures import make_images
from runs.test_families import CACHED, changed, configured, says, states, trained
from tinies.cases import Case, Files, cases
from torch import Tensor
from train.test_hot_path import kept

from sfumato import families
from sfumato.config import Method
from sfumato.errors import UserError
from sfumato.formats.files import read_header
from sfumato.models.base import Models
from sfumato.models.lllites import Lite, read_net
from sfumato.train import dist, loop, measure, run
from sfumato.train.fit import Forecast

CASES = {case.name: case for case in cases() if families.family(case.family).lllite}
SETTINGS: dict[str, Any] = {
    "max_train_steps": 5,  # the last layer moves in the first, what is behind it from the second on
    "save_every_n_steps": 3,
    "save_state": True,
    "network_dim": 6,
    "network_alpha": None,
    "cond_emb_dim": 8,
    "network_dropout": 0.25,
    "gradient_checkpointing": True,
    **CACHED,
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
    made, (data,) = configured(case, files, images / "images", out, "lllite", **{**SETTINGS, **settings})
    (subset,) = data.subsets
    pairs = replace(subset, conditioning_data_dir=str(images / "follow"))
    return run.prepare(made, "lllite", (replace(data, subsets=(pairs,)),), dist.world(), 0.0)


def weights(a_run: loop.Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in a_run.trainable.weights().items()}


def test_it_is_trained_alone(case: Case, files: Files, images: Path, tmp_path: Path) -> None:
    a_run = prepared(case, files, images, tmp_path / "out")
    models: Models = a_run.trainable.models  # type: ignore[attr-defined]
    nets, before = states(models), weights(a_run)
    trained(a_run)
    assert not changed(nets, states(models))
    after = weights(a_run)
    assert changed(before, after) == before.keys()
    result = tmp_path / "out" / "out.safetensors"
    a_run.save_result(result, a_run.step, 0)
    assert read_header(result).metadata["modelspec.architecture"].endswith("/control-net-lllite")
    (follower,) = models.followers
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    a_run.trainable.train(False)
    follower.follow(image)
    wanted = says(models)
    a_run.trainable.remove()
    assert (wanted - says(models)).abs().max() > 1e-5
    again = Lite(models, read_net(models, result))
    again.follow(image)
    torch.testing.assert_close(says(models), wanted, atol=1e-6, rtol=1e-6)
    again.remove()
    # Without checkpointing the same numbers: what is recomputed finds the same image, and drops the same.
    state = str(tmp_path / "out" / "out-step00000003-state")
    resumed = prepared(case, files, images, tmp_path / "again", resume=state, gradient_checkpointing=False)
    trained(resumed)
    assert not changed(after, weights(resumed))
    resumed.trainable.remove()


def one(case: Case) -> None:
    if case.name != min(CASES):
        pytest.skip("another family is tried")


def test_a_file_to_start_from(case: Case, files: Files, images: Path, tmp_path: Path) -> None:
    one(case)
    a_run = prepared(case, files, images, tmp_path / "out", max_train_steps=1, save_every_n_steps=None)
    trained(a_run)
    a_run.save_result(tmp_path / "first.safetensors", 1, 0)
    first, start = weights(a_run), {"network_weights": str(tmp_path / "first.safetensors")}
    again = prepared(case, files, images, tmp_path / "again", network_dim=None, **start)
    with again.log or nullcontext():
        assert not changed(first, weights(again))
    with pytest.raises(UserError, match=r"network_dim 5: the nets of network_weights .* are 6 wide"):
        prepared(case, files, images, tmp_path / "third", network_dim=5, **start)


def test_memory_is_foreseen(case: Case, files: Files, images: Path, tmp_path: Path) -> None:
    one(case)
    a_run = prepared(case, files, images, tmp_path / "out", max_train_steps=2, simulate_vram="1GB")
    with a_run.tracker or nullcontext():
        trained(a_run)
    forecast = Forecast(a_run.config, "lllite", None, a_run.plan, ("micro_batch",), card=False)
    # Its own part is large beside a tiny denoiser.
    assert forecast.of(forecast.now()).device == pytest.approx(measure.peak(a_run), rel=0.2)


def test_beside_what_spares_memory(case: Case, files: Files, images: Path, tmp_path: Path) -> None:
    """Frozen layers in fewer bits, blocks on the host, half of a batch at a time; and nothing waits for a card."""
    one(case)
    settings = {"quantize": "int8", "blocks_to_swap": 1, "mixed_precision": "bf16", "micro_batch": 1}
    a_run = prepared(case, files, images, tmp_path / "out", max_train_steps=2, **settings)
    before = weights(a_run)
    trained(a_run)
    assert len(changed(before, weights(a_run))) > len(before) / 2

    def prepare(case: Case, files: Files, images: Path, out: Path, method: Method, **settings: Any) -> loop.Run:
        return prepared(case, files, images, out, **settings)

    live = dict.fromkeys(CACHED, False)
    a_run = on_card(prepare, case, files, images, tmp_path / "card", "lllite", **live)
    a_run.trainable.models.scaled(torch.zeros(1, 1, 1, 1, device=CARD))  # type: ignore[attr-defined]
    seen = step(a_run, kept(a_run, batch_of(a_run)))
    assert (len(seen.copies), seen.back) == (1, [])
