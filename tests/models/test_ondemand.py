"""Nets and tokenizers that a run may do without are made when they are used, and say until then what must be known of them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tinies.cases import Case, Files, cases

from sfumato import families
from sfumato.formats import lazy
from sfumato.models.autoencoders import scaled, scaling_of
from sfumato.models.loading import materialize, materialize_vae, outline, read_values
from sfumato.models.ondemand import LaterTokenizer, OnDemand

CASES = [case for case in cases() if case.name in ("sd-1", "sdxl-base", "sd3-medium", "flux-dev")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def files(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return case.write(tmp_path_factory.mktemp("model"))


def opened(case: Case, files: Files, later: bool) -> Any:
    family = families.family(case.family)
    options = families.facts(case.family).options(**{**files.options, **case.options})
    names = [part.name for part in family.components if part.name != "denoiser"] if later else []
    models = outline(family, str(files.model), options, vae=files.vae, later=names)
    read_values(models, later=names)
    return models


def settings(models: Any) -> Mapping[str, object]:
    """What keys of kept text outputs depend on."""
    found: Mapping[str, object] = models.tokenize_strategy.settings
    return found


def test_what_is_not_asked_for_is_not_made(
    case: Case, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    now = opened(case, files, later=False)
    assert settings(opened(case, files, later=True)) == settings(now), "remembered from here on"
    later = opened(case, files, later=True)
    monkeypatch.setattr(LaterTokenizer, "_tokenizer", property(lambda self: pytest.fail("a tokenizer was made")))
    assert settings(later) == settings(now)
    assert pickle.loads(pickle.dumps(later.tokenizers)).keys() == now.tokenizers.keys()
    latents = torch.randn(1, later.family.latents.channels, 4, 4)
    assert torch.equal(later.scaled(latents), scaled(latents, scaling_of(now.vae)))
    assert set(later.nets()) == set(now.nets()) and later.vaes is not None
    assert set(later.made()) == {"denoiser"}


def test_what_is_asked_for_later_is_what_would_have_been_made_at_once(case: Case, files: Files) -> None:
    now, later = opened(case, files, later=False), opened(case, files, later=True)
    materialize(later)
    pairs = [*zip(now.nets().values(), later.nets().values(), strict=True), (now.vae, materialize_vae(later))]
    for ours, theirs in pairs:
        one, two = ours.state_dict(), theirs.state_dict()
        assert one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())


def test_asking_whether_there_is_one_makes_none() -> None:
    made: OnDemand[int] = OnDemand({"a": lambda: 1, "b": lambda: pytest.fail("made")})
    assert "b" in made and list(made) == ["a", "b"] and made["a"] == 1 and made.made() == {"a": 1}


def test_what_only_gets_another_name_stays_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of diffusers holds most tensors as the net does; those that are joined or turned are read into memory."""
    case = next(case for case in CASES if case.name == "sd-1")
    case.pipeline().save_pretrained(tmp_path / "folder")
    mapped, old = set[str](), lazy._File.mapped

    def watched(file: Any, name: str) -> Any:
        mapped.add(name)
        return old(file, name)

    monkeypatch.setattr(lazy._File, "mapped", watched)
    held = opened(case, Files(model=tmp_path / "folder"), later=False).source.components["denoiser"]
    renamed = {name for name in held.tensors if held.key_format.renames(name)}
    assert held.key_format.keys is not None and renamed <= mapped
    assert len(renamed) > 0.9 * len(held.tensors)
