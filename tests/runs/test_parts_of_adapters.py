"""No part of an adapter is lost without a word, and a rate of 0 leaves its part out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prepared
import pytest
import torch

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.train import loop


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images and `both.safetensors`, an adapter of U-Net and text encoder that changes both."""
    where = prepared.folder(tmp_path_factory.mktemp("where"))
    made = prepared.prepare(where, output_dir=str(where), network_train_unet_only=False)
    with torch.no_grad():
        for i, weight in enumerate(made.trainable.weights().values()):
            weight.normal_(generator=torch.Generator().manual_seed(i)).mul_(0.1)
    made.save_result(where / "both.safetensors", 0, 0)
    return where


def _names(path: Path) -> set[str]:
    return {"_".join(name.split("_")[:2]) for name in files.load(path)}


@pytest.mark.parametrize(
    "options",
    [
        {"dim_from_weights": True, "text_encoder_lr": (0.0,), "network_train_unet_only": False},
        {"dim_from_weights": True},
        {"network_dim": 2},
    ],
    ids=["text rate 0", "U-Net only", "ranks as set"],
)
def test_what_network_weights_holds_of_a_part_that_is_not_trained_stays(
    where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    before = files.load(where / "both.safetensors")
    a_run = prepared.prepare(
        where, output_dir=str(tmp_path), network_weights=str(where / "both.safetensors"), **options
    )
    assert "clip_l is not trained; the file" in capsys.readouterr().err
    assert all(name.startswith("denoiser") for name in a_run.trainable.weights())
    assert {site[0] for site in a_run.trainable.frozen.by_path()} == {"clip_l"}
    if not options.get("dim_from_weights"):
        return
    loop.train(a_run)
    a_run.save_result(tmp_path / "after.safetensors", 2, 0)
    after = files.load(tmp_path / "after.safetensors")
    assert after.keys() == before.keys()
    text = {name for name in before if name.startswith("lora_te")}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert text and moved and not text & moved


def test_the_part_that_is_not_trained_acts_while_training(where: Path, tmp_path: Path) -> None:
    first, second = (
        prepared.prepare(where, output_dir=str(tmp_path), **more)
        for more in ({}, {"network_weights": str(where / "both.safetensors")})
    )
    tokens = next(next(first.loader.epoch(0)).batches).tokens
    a, b = (a_run.training_step.unowned[0].encode(tokens) for a_run in (first, second))
    assert any(not torch.allclose(a[name], b[name]) for name in a)


def test_a_part_that_the_kept_text_outputs_do_not_know_is_refused(where: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="changes clip_l, which cache_text_encoder_outputs cannot take into account"):
        prepared.prepare(
            where,
            output_dir=str(tmp_path),
            network_weights=str(where / "both.safetensors"),
            cache_text_encoder_outputs=True,
        )


def test_a_part_that_the_file_has_not_is_reported(
    where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: t for name, t in files.load(where / "both.safetensors").items() if name.startswith("lora_unet")}
    files.save(tmp_path / "unet.safetensors", tensors, {})
    settings = {
        "network_weights": str(tmp_path / "unet.safetensors"),
        "dim_from_weights": True,
        "output_dir": str(tmp_path),
    }
    a_run = prepared.prepare(where, network_train_unet_only=False, **settings)
    assert "has nothing for clip_l" in capsys.readouterr().err
    assert [g["name"] for g in a_run.optimizer.param_groups] == ["denoiser"]
    with pytest.raises(UserError, match="nothing for clip_l is in it; leave dim_from_weights out"):
        prepared.prepare(where, network_train_unet_only=False, network_train_text_encoder_only=True, **settings)


@pytest.mark.parametrize(
    ("options", "left"),
    [({"unet_lr": 0.0}, {"lora_te"}), ({"text_encoder_lr": (0.0,)}, {"lora_unet"}), ({}, {"lora_unet", "lora_te"})],
    ids=["denoiser", "text encoder", "none"],
)
def test_a_rate_of_0_leaves_its_part_out_of_the_result(
    where: Path, tmp_path: Path, options: dict[str, Any], left: set[str]
) -> None:
    a_run = prepared.prepare(where, output_dir=str(tmp_path), network_train_unet_only=False, **options)
    a_run.save_result(tmp_path / "a.safetensors", 0, 0)
    assert _names(tmp_path / "a.safetensors") == left


def test_rates_of_0_everywhere_leave_nothing_to_train(where: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is left to train"):
        prepared.prepare(where, output_dir=str(tmp_path), network_train_unet_only=False, learning_rate=0.0)
    with pytest.raises(UserError, match="nothing is left to train"):
        prepared.prepare(where, "full", output_dir=str(tmp_path), learning_rate=0.0)


def test_more_rates_than_text_encoders_are_reported(
    where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run = prepared.prepare(
        where, output_dir=str(tmp_path), network_train_unet_only=False, text_encoder_lr=(1e-4, 2e-4)
    )
    assert "text_encoder_lr: 2 rates for 1 text encoders (clip_l); the others do nothing" in capsys.readouterr().err
    assert [g["lr"] for g in a_run.optimizer.param_groups] == [1e-3, 1e-4]


def test_rates_of_layers_train_and_resume(where: Path, tmp_path: Path) -> None:
    """Each rate has a group of the optimizer, and a state takes them up again."""
    settings = {"network_args": ("network_reg_lrs=.*attn1.*=5e-4", "up_lr_weight=zeros+0.5")}
    first = prepared.prepare(where, output_dir=str(tmp_path), **settings)
    assert [(g["name"], g["lr"]) for g in first.optimizer.param_groups] == [
        ("denoiser 0", 1e-3),
        ("denoiser 1", 5e-4),
    ]
    loop.train(first)
    assert all(p.abs().sum() > 0 for name, p in first.trainable.weights().items() if "lora_down" in name)
    state = tmp_path / "out-state"
    first.save_state(state)
    again = prepared.prepare(where, output_dir=str(tmp_path), resume=str(state), max_train_steps=3, **settings)
    assert [g["name"] for g in again.optimizer.param_groups] == ["denoiser 0", "denoiser 1"]
    with pytest.raises(UserError, match="denoiser 0, denoiser 1 was trained, denoiser is to be trained now"):
        prepared.prepare(where, output_dir=str(tmp_path), resume=str(state), max_train_steps=3)
