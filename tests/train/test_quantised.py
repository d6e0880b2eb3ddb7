"""Frozen nets in fewer bits, from their files to a result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters_on_tinies import adapter_file
from torch import Tensor
from training import config

from sfumato.config import Config, MemoryConfig, Method, Settings
from sfumato.errors import UserError
from sfumato.families.sd.facts import FACTS
from sfumato.formats.files import load
from sfumato.memory.formats import formats
from sfumato.memory.quantise import stored_layers
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.tensors.stored import NF4, Int8
from sfumato.train import devices, resume
from sfumato.train.caching import fingerprint
from sfumato.train.devices import load_models, outline_models, quantised, quantised_notes

X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, 900.0])


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and an adapter of it."""
    folder = tmp_path_factory.mktemp("quantised")
    tiny.short_sd1(folder)
    adapter_file(outline_models(settings(folder)), folder / "a.safetensors")
    return folder


def settings(where: Path, **more: Any) -> Config:
    return config(pretrained_model_name_or_path=str(where / "model.safetensors"), **more)


def read(where: Path, **more: Any) -> tuple[Config, Models]:
    asked = settings(where, **more)
    models = outline_models(asked)
    load_models(asked, models)
    return asked, models


@torch.no_grad()
def prediction(models: Models) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=models.dtypes["denoiser"] == torch.bfloat16):
        cond = models.encode(models.tokenize(["a cat", "a dog"]))
        return models.predict(X, T, cond).float()


def test_what_is_read_is_the_weight_with_what_is_merged_into_it(where: Path) -> None:
    merged = {"base_weights": (str(where / "a.safetensors"),)}
    _, exact = read(where, **merged)
    asked, models = read(where, quantize="int8", quantize_text_encoders="nf4", mixed_precision="bf16", **merged)
    for name, net in {"denoiser": models.denoiser, **models.encoders}.items():
        wide, layers = exact.nets()[name], stored_layers(net)
        assert layers and {type(layer.format) for layer in layers.values()} == ({Int8} if name == "denoiser" else {NF4})
        for path, layer in layers.items():
            weight = wide.get_submodule(path).weight
            assert layer.weight.dtype == torch.bfloat16 and not layer.weight.requires_grad
            parts = layer.format.quantise(weight)  # not rounded to bf16 before
            assert all(torch.equal(layer.parts[part], t) for part, t in parts.items()), path
            assert float(layer.error) < (0.012 if name == "denoiser" else 0.12)
    before = prediction(exact)
    assert 0 < (prediction(models) - before).norm() / before.norm() < 0.1
    notes = quantised_notes(asked, models)
    assert len(notes) == 2 and "layers in int8" in notes[0] and "in the mean" in notes[0]
    # As expected of the headers alone.
    assert quantised(asked, outline_models(asked), None) == quantised(asked, models, None)


def test_a_net_that_is_read_again_and_a_model_that_is_saved(where: Path, tmp_path: Path) -> None:
    _, models = read(where, fp8_base=True)
    before = prediction(models)
    loading.unload(models)
    assert all(t.is_meta for net in models.encoders.values() for t in (*net.parameters(), *net.buffers()))
    loading.materialize(models)
    assert torch.equal(prediction(models), before)
    loading.save(models, tmp_path / "out.safetensors", layout="single_file", dtype=None, metadata={})
    source, saved = load(where / "model.safetensors"), load(tmp_path / "out.safetensors")
    assert source.keys() == saved.keys() and all(torch.equal(t, saved[name]) for name, t in source.items())


def test_each_layer_in_the_smallest_format_within_the_budget(where: Path) -> None:
    def chosen(budget: float) -> set[str]:
        _, models = read(where, quantize="auto", quantize_budget=budget)
        layers = stored_layers(models.denoiser).values()
        assert all(float(layer.error) <= budget for layer in layers)
        return {type(layer.format).__name__ for layer in layers}

    assert chosen(0.2) == {"NF4", "Int8"}  # what modulates, or has no blocks of 64 inputs
    assert chosen(0.02) == {"Int8"} and chosen(0.0) == {"Wide"}


@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("double_blocks.0.img_mlp.0", NF4()),
        ("double_blocks.0.img_mod.lin", Int8(64)),
        ("layers.1.adaLN_modulation.1", Int8(64)),
        ("input_blocks.1.0.emb_layers.1", Int8(64)),
    ],
)
def test_what_modulates_is_in_8_bits(path: str, format: Any) -> None:
    assert formats("nf4", path, (64, 64)) == (format,)
    assert formats("nf4", path, (64, 48)) == (Int8(16),)  # no blocks of 64 inputs


@pytest.mark.parametrize(
    ("memory", "denoiser", "encoders"),
    [
        ({}, None, None),
        ({"fp8_base": True}, "fp8", "fp8"),
        ({"fp8_base": True, "fp8_base_unet": True}, "fp8", None),
        ({"fp8_scaled": True}, "fp8", None),
        ({"quantize": "nf4", "quantize_text_encoders": "int8"}, "nf4", "int8"),
    ],
    ids=str,
)
def test_what_kohyas_switches_mean(memory: dict[str, Any], denoiser: str | None, encoders: str | None) -> None:
    found = MemoryConfig(**memory)
    assert (found.denoiser_format, found.encoder_format) == (denoiser, encoders)


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("full", {"quantize": "int8"}),
        ("full", {"fp8_base": True}),
        ("full", {"quantize_text_encoders": "nf4", "train_text_encoder": True}),
        ("network", {"quantize": "nf4", "fp8_base": True}),
        ("network", {"quantize_text_encoders": "nf4", "stream_text_encoders": True}),
    ],
    ids=str,
)
def test_what_is_refused(method: Method, asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"not quantised|another format|spare nothing"):
        FACTS.check(Settings.of(config(**asked), method))


def test_text_encoders_in_fewer_bits_are_read_whole(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LARGE", 1)
    for kept, names in ((None, {"clip_l"}), ("int8", set())):
        asked = settings(where, quantize_text_encoders=kept, cache_text_encoder_outputs=True)
        assert devices.streamed(asked, outline_models(asked), "network").keys() == names


def test_text_that_is_cached_is_that_of_this_format(where: Path) -> None:
    kinds: list[dict[str, Any]] = [{"quantize_text_encoders": kind} for kind in (None, "int8", "nf4")]
    kinds.append({"quantize_text_encoders": "int8", "int8_matmul": True})  # where captions are rounded as well
    assert len({fingerprint(*read(where, **kind), "clip_l") for kind in kinds}) == 4


def test_another_format_is_told_to_a_resumed_run() -> None:
    def saved(**memory: Any) -> dict[str, Any]:
        return {"config": resume.as_json(asdict(Config(memory=MemoryConfig(**memory)))), "precision": "no", "base": {}}

    told = resume.changes(saved(quantize="nf4"), saved(quantize="int8", gradient_checkpointing=True), torch.optim.AdamW)
    assert told == ["quantize was nf4 and is now int8: it acts from here on"]
