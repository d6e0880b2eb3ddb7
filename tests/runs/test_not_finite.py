"""Numbers that are not finite have one cause, and that is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch

from sfumato.data.batch import Batch
from sfumato.data.loader import Loader
from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.train import loop


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared.folder(tmp_path_factory.mktemp("where"))


def _spoiled(where: Path, prefix: str) -> str:
    """The model, beside it, with NaN in the first weight whose name starts so."""
    tensors = files.load(where / "model.safetensors")
    name = next(name for name in tensors if name.startswith(prefix) and name.endswith("weight"))
    files.save(where / "spoiled.safetensors", {**tensors, name: tensors[name] * torch.nan}, {})
    return str(where / "spoiled.safetensors")


def _lost(where: Path, out: Path, **options: Any) -> str:
    a_run = prepared.prepare(where, output_dir=str(out), save_state=False, **options)
    with pytest.raises(UserError) as error:
        loop.train(a_run)
    assert len(error.value.messages) == 1
    return error.value.messages[0]


@pytest.mark.parametrize(
    ("prefix", "title"), [("model.diffusion_model.", "U-Net"), ("cond_stage_model.", "text encoder")]
)
def test_a_damaged_base_model_is_named(where: Path, tmp_path: Path, prefix: str, title: str) -> None:
    text = _lost(where, tmp_path, pretrained_model_name_or_path=_spoiled(where, prefix))
    assert "spoiled.safetensors" in text and title in text and "NaN" in text
    assert "earning rate" not in text and "overflow" not in text


@pytest.mark.parametrize("prefix", ["first_stage_model.encoder.", "cond_stage_model."])
def test_a_damaged_net_is_named_when_its_outputs_are_kept(where: Path, tmp_path: Path, prefix: str) -> None:
    model = _spoiled(where, prefix)
    with pytest.raises(UserError, match=r"spoiled\.safetensors .* holds NaN or infinity"):
        prepared.prepare(
            where,
            output_dir=str(tmp_path),
            pretrained_model_name_or_path=model,
            cache_latents=True,
            cache_text_encoder_outputs=True,
        )


@pytest.mark.parametrize("what", ["latents", "text outputs"])
def test_a_damaged_cache_is_named(where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    whole = Loader._batch

    def spoiled(*args: Any) -> Batch:
        batch = whole(*args)
        assert batch.cond is not None and batch.latents is not None
        cond = {name: t * torch.nan for name, t in batch.cond.items()}
        return replace(batch, latents=batch.latents * torch.nan) if what == "latents" else replace(batch, cond=cond)

    monkeypatch.setattr(Loader, "_batch", spoiled)
    text = _lost(where, tmp_path, cache_latents=True, cache_text_encoder_outputs=True)
    assert f"The cached {what} of one of the" in text and "'picture 0'" in text


def test_a_learning_rate_that_is_too_high_is_named_as_it_was_used(where: Path, tmp_path: Path) -> None:
    text = _lost(
        where,
        tmp_path,
        optimizer_type="torch.optim.SGD",
        optimizer_args=(),
        unet_lr=1000.0,
        network_alpha=1e20,
        max_train_steps=5,
        max_grad_norm=0.0,
    )
    assert "Lower the learning rate, which was 1000 (denoiser)" in text


def test_an_adapter_with_nan_is_named_by_file_and_layer(where: Path, tmp_path: Path) -> None:
    first = prepared.prepare(where, output_dir=str(tmp_path))
    first.save_result(tmp_path / "a.safetensors", 0, 0)
    tensors = files.load(tmp_path / "a.safetensors")
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    files.save(tmp_path / "b.safetensors", {**tensors, name: tensors[name] + torch.nan}, {})
    with pytest.raises(UserError, match=rf"network_weights .*b\.safetensors: {name} holds NaN"):
        prepared.prepare(where, output_dir=str(tmp_path), network_weights=str(tmp_path / "b.safetensors"))
