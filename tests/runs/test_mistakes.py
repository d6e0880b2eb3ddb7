"""A user's mistake gives one clear message, and leaves nothing half-written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Train, config

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.train import run


def test_a_full_disk_while_saving(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "serialise", full)
    with pytest.raises(UserError, match="disk is full"):
        train("a")
    assert not [p for p in (tmp_path / "a").iterdir() if "safetensors" in p.name]


def test_a_truncated_base_model(train: Train, model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut\.safetensors") as error:
        train("a", pretrained_model_name_or_path=str(cut))
    assert len(error.value.messages) == 1


def test_an_adapter_as_base_model(train: Train) -> None:
    adapter = train("a", max_train_steps=1) / "out.safetensors"
    with pytest.raises(UserError, match=r"an adapter .* not a base model"):
        train("b", pretrained_model_name_or_path=str(adapter))


def test_an_empty_folder(train: Train, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        train("a", subset={"image_dir": str(tmp_path / "empty")})


def test_a_loss_that_is_not_finite(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.train import step

    monkeypatch.setattr(step.losses, "loss", lambda kind, prediction, target, **_: prediction * torch.nan)
    with pytest.raises(UserError, match="the loss of step 1 is nan"):
        train("a")
    assert not (tmp_path / "a" / "out.safetensors").exists()


def test_what_was_not_trained_cannot_be_resumed(train: Train) -> None:
    first = train("a", save_state=True, network_dim=2)
    with pytest.raises(UserError, match="network_dim was 2 and is now 3"):
        train("b", resume=str(first / "out-state"), network_dim=3, max_train_steps=8)
    with pytest.raises(UserError, match="raise --max_train_steps"):
        train("c", resume=str(first / "out-state"), network_dim=2)


def test_a_model_without_its_parts_is_reported_before_images_are_read(
    train: Train, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = files.load(model)
    files.save(
        tmp_path / "part.safetensors", {n: t for n, t in tensors.items() if not n.startswith("cond_stage_model.")}, {}
    )
    monkeypatch.setattr(run, "open_data", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(UserError, match="no text_encoder"):
        train("a", pretrained_model_name_or_path=str(tmp_path / "part.safetensors"))
    with pytest.raises(UserError, match="no text_encoder"):
        run.cache(config(pretrained_model_name_or_path=str(tmp_path / "part.safetensors")), ())
    with pytest.raises(UserError, match="network_args 'colour'"):
        train("a", network_args=("colour=2",))
