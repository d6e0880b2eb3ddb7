"""Every family that has ControlNets trains them: they alone change, a saved one says what the trained one said, and a resumed
training goes on as if it had not stopped."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from run_fixtures import make_images
from runs.test_families import changed, configured, says, states, trained
from tinies.cases import Case, Files, cases
from torch import Tensor

from sfumato import families
from sfumato.config import Method
from sfumato.formats.files import load, read_header
from sfumato.models.base import Models
from sfumato.models.controlled import Controlled, read_net
from sfumato.train import dist, loop, measure, run
from sfumato.train.fit import Forecast

CASES = {case.family: case for case in reversed(cases()) if families.family(case.family).control}
"""One of each family: what differs within one is compared in `tests/families/`."""
CASES["sd"] = replace(CASES["sd"], write=lambda folder: Files(model=tiny.short_sd1(folder)))
STEPS = 5
"""The doors open in the first; what is behind two of them has a gradient from the third on."""
SETTINGS: dict[str, Any] = {
    "max_train_steps": STEPS,
    "save_every_n_steps": 3,
    "save_state": True,
    "control_net_lr": 2e-3,
    # The VAE and the text encoders are not there any more when a step begins, but for what latents are followed by.
    "cache_latents": True,
    "cache_text_encoder_outputs": True,
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


def prepared(
    case: Case, files: Files, images: Path, out: Path, method: Method = "controlnet", **settings: Any
) -> loop.Run:
    """A run on images that follow others."""
    made, (data,) = configured(case, files, images / "images", out, method, **{**SETTINGS, **settings})
    (subset,) = data.subsets
    pairs = replace(subset, conditioning_data_dir=str(images / "follow"))
    return run.prepare(made, method, (replace(data, subsets=(pairs,)),), dist.world(), 0.0)


def weights(a_run: loop.Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in a_run.trainable.weights().items()}


def test_a_control_net_is_trained_alone(case: Case, files: Files, images: Path, tmp_path: Path) -> None:
    a_run = prepared(case, files, images, tmp_path / "out", gradient_checkpointing=True)
    models: Models = a_run.trainable.models  # type: ignore[attr-defined]
    nets, before = states(models), weights(a_run)
    (follower,) = models.followers
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    follower.follow(image)
    born = says(models)
    trained(a_run)
    assert not changed(nets, states(models))
    after = weights(a_run)
    assert changed(before, after) == before.keys()
    result = tmp_path / "out" / "out.safetensors"
    a_run.save_result(result, a_run.step, 0)
    assert read_header(result).metadata["modelspec.architecture"].endswith("/controlnet")
    follower.follow(image)
    wanted = says(models)
    follower.strength = 0.0
    weightless = says(models)
    a_run.trainable.remove()
    alone = says(models)
    assert (wanted - alone).abs().max() > 1e-4
    assert torch.equal(born, alone) and torch.equal(weightless, alone)
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


SGD: dict[str, Any] = {
    # Its first step does not make a difference in the last bits of a gradient that is almost 0 as large as any.
    "optimizer_type": "SGDNesterov",
    "learning_rate": 0.1,
    "control_net_lr": None,
    "max_train_steps": 2,
    "save_every_n_steps": None,
    "save_state": False,
    "cache_latents": True,
    "cache_text_encoder_outputs": True,
}
SPARED: dict[str, dict[str, Any]] = {
    "streamed, in parts": {
        "blocks_to_swap": 3,
        "gradient_checkpointing": True,
        "cpu_offload_checkpointing": True,
        "micro_batch": 1,
    },
    "fused": {"blockwise_fused_optimizers": True, "optimizer_state_on_cpu": True, "gradient_checkpointing": True},
}
"""Settings that spare memory and change no number."""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A Stable Diffusion of few blocks."""
    return CASES["sd"].write(tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def whole(short: Files, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights after two steps with no such setting."""
    return steps(short, images, tmp_path_factory.mktemp("whole"))


def steps(short: Files, images: Path, out: Path, **settings: Any) -> dict[str, Tensor]:
    a_run = prepared(CASES["sd"], short, images, out, **{**SGD, **settings})
    trained(a_run)
    a_run.trainable.remove()
    return weights(a_run)


@pytest.mark.parametrize("name", SPARED)
def test_what_spares_memory_changes_nothing(
    name: str, short: Files, images: Path, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    found = steps(short, images, tmp_path, **SPARED[name])
    assert found.keys() == whole.keys()
    for weight, value in found.items():
        torch.testing.assert_close(value, whole[weight], rtol=1e-3, atol=1e-6, msg=weight)


def test_it_grows_beside_a_model_in_fewer_bits(short: Files, images: Path, tmp_path: Path) -> None:
    """From the values of the file; it starts again from the folder that it gave."""
    fewer = {"quantize": "int8", "control_net_lr": 0.2, "save_model_as": "diffusers"}
    a_run = prepared(CASES["sd"], short, images, tmp_path / "out", **{**SGD, **fewer})
    grown, file = weights(a_run), load(short.model)
    copied = {name: f"model.diffusion_model.{name.removeprefix('controlnet.')}" for name in grown}
    assert sum(name in file for name in copied.values()) > 50
    assert all(torch.equal(grown[ours], file[name].float()) for ours, name in copied.items() if name in file)
    slow, fast = sorted(a_run.trainable.groups(), key=lambda group: group.lr)
    assert (slow.lr, fast.lr) == (0.1, 0.2) and len(slow.parameters) == sum(name in file for name in copied.values())
    trained(a_run)
    a_run.save_result(tmp_path / "out-v1.0", a_run.step, 0)
    held = weights(a_run)
    a_run.trainable.remove()
    start = {"controlnet_model_name_or_path": str(tmp_path / "out-v1.0")}
    again = prepared(CASES["sd"], short, images, tmp_path / "again", **{**SGD, **start})
    with again.log or nullcontext():
        assert not changed(held, weights(again))


def test_what_it_needs_of_memory_is_predicted(short: Files, images: Path, tmp_path: Path) -> None:
    settings = {**SGD, "gradient_checkpointing": True, "simulate_vram": "1GB"}
    a_run = prepared(CASES["sd"], short, images, tmp_path, **settings)
    assert a_run.tracker and a_run.log
    with a_run.log, a_run.tracker:
        assert loop.train(a_run)
        taken = measure.peak(a_run)
    forecast = Forecast(a_run.config, "controlnet", None, a_run.plan, ("micro_batch",), card=False)
    assert forecast.of(forecast.now()).device == pytest.approx(taken, rel=0.05)
