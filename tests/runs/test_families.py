"""Every family trains with everything that can be trained: what is named changes, nothing else does, and a saved result is what was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tinies.cases import Case, Files, cases
from torch import Tensor
from training import config

from sfumato import adapters, families
from sfumato.adapters.insert import from_state
from sfumato.config import Config, DatasetConfig, Method, SubsetConfig
from sfumato.families.base import Models, Setting
from sfumato.families.loading import fetch
from sfumato.formats.files import read_header
from sfumato.train import dist, loop, run
from sfumato.train.sample import encode
from sfumato.train.trainables import read_adapter

ALL = [pytest.param(case, id=case.name) for case in cases()]
CURVES = Path(__file__).parents[1] / "fixtures" / "curves.json"
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def files(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return case.write(tmp_path_factory.mktemp("model"))


def prepared(case: Case, files: Files, pictures: Path, out: Path, method: Method, **told: Any) -> loop.Course:
    """A run of three steps, ready to go."""
    facts = families.facts(case.family)
    options = {**files.options, **case.options, **told.pop("options", {})}
    flat = {
        "pretrained_model_name_or_path": str(files.model),
        "vae": files.vae,
        "output_dir": str(out),
        "output_name": "out",
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "network_dim": 2,
        "network_alpha": 2.0,
        "seed": 7,
        **facts.defaults,
        **told,
    }
    data = DatasetConfig(subsets=(SubsetConfig(image_dir=str(pictures)),), resolution=(128, 64), batch_size=2)
    made: Config = config(**flat, family=facts.options(**options))
    return run.prepare(made, method, (data,), dist.world(), 0.0)


def trained(course: loop.Course) -> Models:
    with course.log or nullcontext():
        assert loop.run(course)
    models: Models = course.trainable.models  # type: ignore[attr-defined]
    return models


def says(models: Models) -> Tensor:
    """What a model says of fixed latents and a caption."""
    facts, n = models.family.latents, 2
    x = torch.randn(n, facts.channels, 8, 8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * n)
    fetch(models)  # where text outputs are kept, the encoders were not even read
    with torch.no_grad():
        cond = models.family.condition(models, encode(models, ["picture 1, red", "blue"]), Setting(sizes=sizes))
        return models.family.predict(models.denoiser, x, torch.tensor([100.0, 700.0]), cond)


def states(models: Models) -> dict[str, Tensor]:
    fetch(models)
    nets = {**models.nets(), "vae": models.the_vae()}
    return {f"{name}.{k}": t.clone() for name, net in nets.items() for k, t in net.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("told", [{}, CACHED, {"gradient_checkpointing": True}], ids=["live", "cached", "checkpointed"])
def test_a_whole_model_without_its_text_encoders(case: Case, files: Files, pictures: Path, tmp_path: Path, told: dict[str, Any]) -> None:
    whole(case, files, pictures, tmp_path, {"denoiser"}, **told)


def test_a_whole_model_with_its_text_encoders(case: Case, files: Files, pictures: Path, tmp_path: Path) -> None:
    options = families.facts(case.family).options(**{**files.options, **case.options})
    may = families.family(case.family).trainable(options, None)
    encoders = set(case.models(files).encoders) & (may if may is not None else set(case.models(files).encoders))
    whole(case, files, pictures, tmp_path, {"denoiser", *encoders}, train_text_encoder=True)


def whole(case: Case, files: Files, pictures: Path, out: Path, components: set[str], **told: Any) -> None:
    course = prepared(case, files, pictures, out, "full", **told)
    before = states(course.trainable.models)  # type: ignore[attr-defined]
    models = trained(course)
    moved = changed(before, states(models))
    expected = {
        f"{name}.{path}"
        for name in components
        for path, _ in models.nets()[name].named_parameters()
        if not re.fullmatch(case.unmoved, f"{name}.{path}")
    }
    assert moved == expected
    result = out / "out.safetensors"
    course.save_result(result, 3, 0)
    beside = {name: str(out / f"out_{name}.safetensors") for name in components if (out / f"out_{name}.safetensors").exists()}
    again = case.models(Files(model=result, options={**files.options, **beside}, vae=files.vae), tokenizer=str(files.model.parent))
    assert not changed(states(again), states(models))
    # torch multiplies by another kernel where a weight takes gradients, so equal weights may say what differs in the last bits.
    torch.testing.assert_close(says(again), says(models), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", adapters.kinds())
@pytest.mark.parametrize("told", [{}, CACHED, {"network_train_unet_only": True}], ids=["text", "cached", "denoiser"])
def test_adapters(case: Case, files: Files, pictures: Path, tmp_path: Path, kind: str, told: dict[str, Any]) -> None:
    course = prepared(case, files, pictures, tmp_path, "network", network_module=kind, **told)
    before = states(course.trainable.models)  # type: ignore[attr-defined]
    models = trained(course)
    assert not changed(before, states(models))
    may = models.family.trainable(models.options, course.trainable.plan)  # type: ignore[attr-defined]
    assert set(course.trainable.trained) == {"denoiser", *([] if told else models.encoders if may is None else may)}
    inserted = course.trainable.inserted.sites()  # type: ignore[attr-defined]
    still = [".".join(site) for site, adapter in inserted.items() if not adapter.change(torch.zeros_like(weight_of(models, site))).any()]
    assert not [site for site in still if not re.fullmatch(case.unmoved, f"{site}.weight")]
    result = tmp_path / "out.safetensors"
    course.save_result(result, 3, 0)
    course.trainable.train(False)
    wanted = says(models)
    fresh = case.models(files)
    held = from_state(fresh.nets(), read_adapter(fresh, result)).eval()
    torch.testing.assert_close(says(fresh), wanted, atol=1e-6, rtol=1e-6)
    held.remove()
    assert (says(fresh) - wanted).abs().max() > 1e-6
    assert read_header(result).metadata["ss_base_model_version"] == families.facts(case.family).base_model_version(models.options)


def weight_of(models: Models, site: tuple[str, str]) -> Tensor:
    weight = models.nets()[site[0]].get_submodule(site[1]).weight
    assert isinstance(weight, Tensor)
    return weight


def curve(case: Case, files: Files, pictures: Path, out: Path) -> list[float]:
    """Losses of 20 steps."""
    course = prepared(case, files, pictures, out, "network", max_train_steps=20, network_train_unet_only=True, **CACHED)
    trained(course)
    return [json.loads(line)["loss"] for line in (out / "out.jsonl").read_text().splitlines()]


def test_twenty_steps_are_what_they_were(case: Case, files: Files, pictures: Path, tmp_path: Path) -> None:
    """A change that should not alter numbers does not. One that should brings a new tests/fixtures/curves.json: run this file."""
    wanted = json.loads(CURVES.read_text())[case.name]
    assert curve(case, files, pictures, tmp_path) == pytest.approx(wanted, rel=1e-3)
