"""What two checkpoints differ in, as a LoRA: merged into the first, it gives the second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tinies.cases import Case, Files, cases

from sfumato.adapters.insert import from_state
from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.models.base import Models
from sfumato.models.loading import save
from sfumato.tools.extract import Extraction, extract
from sfumato.train.trainables import read_adapter


@pytest.fixture(scope="module", params=[pytest.param(c, id=c.name) for c in cases()][::2])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def written(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return case.write(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(case: Case, written: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Models, Path]:
    """The model with every adapted kind of layer of its blocks changed, and one norm or bias."""
    models, g = case.models(written), torch.Generator().manual_seed(5)
    inside = {id(m) for block in models.family.blocks(models.denoiser) for m in block.modules()}
    for module in models.denoiser.modules():
        if id(module) in inside and isinstance(module, torch.nn.Linear):
            module.weight += 0.1 * torch.randn(module.weight.shape, generator=g)
    path = tmp_path_factory.mktemp("tuned") / written.model.name
    save(models, path, layout="single_file", dtype=None, metadata={})
    return models, path


def test_merged_into_the_original_it_gives_the_tuned_model(
    case: Case, written: Files, tuned: tuple[Models, Path], tmp_path: Path
) -> None:
    conv = 512 if "conv" in tuned[0].family.targets["denoiser"] else None
    how = Extraction(rank=512, conv_rank=conv, dtype=torch.float32, options={**written.options, **case.options})
    facts = extract(written.model, tuned[1], tmp_path / "out.safetensors", how)
    assert facts["layers"] and all(layer["error"] < 1e-3 for layer in facts["layers"])
    models = case.models(written)
    network = from_state(models.nets(), read_adapter(models, tmp_path / "out.safetensors"))
    network.merge()
    network.remove()
    wanted = tuned[0].denoiser.state_dict()
    for name, t in models.denoiser.state_dict().items():
        if f"denoiser.{name}" not in facts["unheld"]:
            torch.testing.assert_close(t, wanted[name], atol=1e-5, rtol=1e-5)
    small = extract(written.model, tuned[1], tmp_path / "small.safetensors", replace(how, rank=2, conv_rank=None))
    assert (
        all(layer["rank"] <= 2 for layer in small["layers"]) and max(layer["error"] for layer in small["layers"]) > 0.1
    )


def test_models_that_do_not_differ_are_refused(case: Case, written: Files, tmp_path: Path) -> None:
    how = Extraction(rank=2, options={**written.options, **case.options})
    with pytest.raises(UserError, match="do not differ"):
        extract(written.model, written.model, tmp_path / "out.safetensors", how)
    with pytest.raises(UserError, match="also read"):
        extract(written.model, written.model, written.model, how)
    with pytest.raises(UserError, match=r"--to kohia: expected .*did you mean 'kohya'"):
        extract(written.model, written.model, tmp_path / "out.safetensors", replace(how, dialect="kohia"))
    with pytest.raises(UserError, match="--rank 0: expected 1 or more"):
        replace(how, rank=0)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_change_of_number_format_is_no_difference(case: Case, written: Files, tmp_path: Path) -> None:
    half = tmp_path / written.model.name
    files.save(half, {n: t.to(torch.bfloat16) for n, t in files.load(written.model).items()})
    with pytest.raises(UserError, match="do not differ"):
        extract(
            written.model,
            half,
            tmp_path / "out.safetensors",
            Extraction(rank=2, options={**written.options, **case.options}),
        )
