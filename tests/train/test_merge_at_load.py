"""Adapters that are merged while weights are read: the same as hooks, rounded once, whenever a net is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from adapters_on_tinies import adapter_file
from PIL import Image
from training import config

from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.formats.planned import made
from sfumato.models import loading, saving
from sfumato.train.devices import load_models, outline_models
from sfumato.train.pipeline import Pipeline

X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, 900.0])


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two adapters that act on both its nets."""
    folder = tmp_path_factory.mktemp("merge_at_load")
    tiny.short_sd1(folder)
    models = outline_models(settings(folder))
    for i, name in enumerate("ab"):
        adapter_file(models, folder / f"{name}.safetensors", seed=i)
    return folder


def settings(where: Path, **more: Any) -> Any:
    return config(pretrained_model_name_or_path=str(where / "model.safetensors"), **more)


def prediction(models: Any) -> torch.Tensor:
    with torch.no_grad():
        cond = models.encode(models.tokenize(["a cat", "a dog"]))
        return models.predict(X, T, cond)


def test_merged_adapters_predict_what_worn_ones_do(where: Path) -> None:
    files = [(where / "a.safetensors", 0.8), (where / "b.safetensors", -0.5)]
    plain = Pipeline.of(settings(where))
    alone = prediction(plain.models)
    with plain.adapted(files[0][0], strength=0.8), plain.adapted(files[1][0], strength=-0.5):
        worn = prediction(plain.models)
    merged = prediction(Pipeline.of(settings(where), adapters=files).models)
    assert (worn - alone).abs().max() > 0.01
    torch.testing.assert_close(merged, worn, atol=1e-4, rtol=1e-4)
    base = settings(where, base_weights=tuple(str(p) for p, _ in files), base_weights_multiplier=(0.8, -0.5))
    torch.testing.assert_close(prediction(Pipeline.of(base).models), merged, atol=0, rtol=0)


def test_the_command_takes_several_files_with_strengths(where: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    words = ["sample", "--pretrained_model_name_or_path", str(where / "model.safetensors"), "--sample_prompts",
             str(tmp_path / "prompts.txt"), "--output_dir", str(tmp_path), "--mixed_precision", "no"]  # fmt: skip
    a, b = (str(where / f"{name}.safetensors") for name in "ab")
    images = []
    for more in (["--network_weights", a, "0.8", b, "-0.5"],
                 ["--base_weights", a, b, "--base_weights_multiplier", "0.8", "-0.5"]):  # fmt: skip
        assert main([*words, *more]) == 0
        images.append(np.asarray(Image.open(capsys.readouterr().out.strip())).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
    for wrong, says in ((["0.8", a], "a strength stands after its file"), ([a, "none.safetensors"], "no such file")):
        assert main([*words, "--network_weights", *wrong]) == 2
        assert says in capsys.readouterr().err


def loaded(where: Path, dtype: Any = None, **more: Any) -> Any:
    models = outline_models(settings(where, base_weights=(str(where / "a.safetensors"),), **more))
    load_models(settings(where, base_weights=(str(where / "a.safetensors"),), **more), models)
    return models


def test_what_is_merged_is_rounded_once(where: Path) -> None:
    exact, half = loaded(where), loaded(where, mixed_precision="bf16")
    for name, t in exact.denoiser.state_dict().items():
        assert torch.equal(half.denoiser.state_dict()[name], t.to(torch.bfloat16)), name


def test_text_encoders_that_are_read_again_and_saved_are_merged(where: Path, tmp_path: Path) -> None:
    models = loaded(where, cache_text_encoder_outputs=True)
    encoder = models.encoders["clip_l"]
    assert next(encoder.parameters()).is_meta
    loading.materialize(models)
    first = {name: t.clone() for name, t in encoder.state_dict().items()}
    loading.unload(models)
    loading.materialize(models)
    assert all(torch.equal(t, first[name]) for name, t in encoder.state_dict().items())
    weights = models.source.components["clip_l"]
    plain = dict(weights.unmerged().natives())
    assert any(not torch.equal(t, plain[name]) for name, t in first.items())
    assert saving.unchanged(first, weights) and not saving.unchanged(first, weights.unmerged())
    loading.unload(models)
    saved = saving.values(encoder, weights, {}, None)
    assert all(torch.equal(made(t), first[name]) for name, t in saved.items())


def test_a_file_that_does_not_fit_is_named(where: Path, tmp_path: Path) -> None:
    from sfumato.formats import files

    tensors = files.load(where / "a.safetensors")
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    files.save(tmp_path / "wide.safetensors", {**tensors, name: torch.zeros(3, len(tensors[name][0]))})
    with pytest.raises(UserError, match="expected"):
        Pipeline.of(settings(where), adapters=[(tmp_path / "wide.safetensors", 1.0)])
