"""What a user sets beside `resume` acts, or is refused, or is reported: never dropped without a word."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
from training import config

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats import run as runs
from sfumato.train import plan, resume, run


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, images and, in `first`, the state of a run of two steps."""
    where = prepared.folder(tmp_path_factory.mktemp("before"))
    run.train(prepared.options(where), "network", prepared.data(where))
    return where


def _resumed(
    where: Path, out: Path, method: str = "network", data: dict[str, Any] | None = None, **options: Any
) -> Any:
    settings = {"resume": str(where / "first" / "out-state"), "max_train_steps": 4, "output_dir": str(out), **options}
    return prepared.prepare(where, method, data, **settings)


def test_changed_arguments_of_the_optimizer_act(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run = _resumed(before, tmp_path, optimizer_args=("weight_decay=0.5", "betas=(0.5, 0.6)"), learning_rate=1e-4)
    (group,) = a_run.optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.5, (0.5, 0.6), 1e-4)
    text = capsys.readouterr().err
    for line in (
        "optimizer_args weight_decay was 0.01 and is now 0.5",
        "optimizer_args betas was not set and is now 0.5 0.6",
        "learning_rate was 0.001",
    ):
        assert line in text


def test_what_did_not_change_is_not_spoken_of(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _resumed(before, tmp_path, save_every_n_steps=1, vae_batch_size=2, mixed_precision="no")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resume:")]
    assert len(lines) == 1 and "going on after step 2 of 4" in lines[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"network_alpha": 2.0}, "network_alpha was not set and is now 2.0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is now 2"),
        ({"mixed_precision": "fp16"}, "mixed_precision was no and is now fp16"),
        ({"loss_type": "l1"}, "loss_type was l2 and is now l1"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler was constant and is now cosine"),
        ({"lr_scheduler": "cosine"}, "the run had 2 steps in all and has 4 now"),
        ({"seed": 8}, "seed was 7 and is now 8"),
        ({"ema_decay": 0.9}, "the moving average starts from the weights as they are now"),
        ({"data": {"shuffle_caption": True}}, "shuffle_caption was False and is now True"),
        ({"network_weights": "first/out.safetensors"}, "does not act: the weights are those of the state"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_other_settings_are_reported(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], says: str
) -> None:
    if "network_weights" in options:
        options = {"network_weights": str(before / options["network_weights"])}
    a_run = _resumed(before, tmp_path, **options)
    assert says in capsys.readouterr().err
    if a_run.ema:
        assert all(torch.equal(a_run.ema.average[name], w) for name, w in a_run.trainable.weights().items())


def test_a_dry_run_says_what_the_images_have_otherwise(before: Path, tmp_path: Path) -> None:
    state = str(before / "first" / "out-state")
    config = prepared.options(before, resume=state, max_train_steps=4, output_dir=str(tmp_path), lr_scheduler="cosine")
    kept = prepared.data(before, num_repeats=3, custom_attributes={"diff_output_preservation": True})
    said = [note for note in plan.facts(config, "network", kept)["notes"] if note.startswith("resume: ")]
    assert [line.removeprefix("resume: ") for line in said if "lr_scheduler" not in line] == [
        "the dataset has changed (1 steps an epoch then, 3 now)",
        "custom_attributes was not set and is now {'diff_output_preservation': True}: it acts from here on",
        "num_repeats was 1 and is now 3: it acts from here on",
        "the run had 2 steps in all and has 4 now: cosine goes over the new number",
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"optimizer_type": "Lion", "optimizer_args": ()},
            "the optimizer was torch.optim.adamw.AdamW and is now pytorch_optimizer",
        ),
        ({"optimizer_args": ("amsgrad=True",)}, "AdamW needs max_exp_avg_sq"),
        ({"network_dim": 3}, "network_dim was 2 and is now 3"),
        ({"network_train_unet_only": False}, "denoiser was trained, denoiser, clip_l is to be trained now"),
        ({"network_args": ("loraplus_lr_ratio=4",)}, "denoiser, denoiser.plus is to be trained now"),
        ({"network_args": ("conv_dim=2",)}, "conv_dim was not set and is now 2"),
        ({"method": "full"}, "of a run that trained an adapter"),
        ({"pretrained_model_name_or_path": "other.safetensors"}, "is not the model that the run began with"),
        ({"resume": "nowhere"}, "no such folder"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_cannot_change_is_refused_before_weights_are_read(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(run, "settle", lambda *_: pytest.fail("weights were read"))
    if "pretrained_model_name_or_path" in options:
        tensors = {
            name: t + 0.01 if name.endswith("to_q.weight") else t
            for name, t in files.load(before / "model.safetensors").items()
        }
        files.save(before / "other.safetensors", tensors, {})
        options = {"pretrained_model_name_or_path": str(before / "other.safetensors")}
    with pytest.raises(UserError, match=says):
        _resumed(before, tmp_path, **options)


def test_the_word_that_is_learnt_cannot_change(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, Any] = {"network_dim": None, "network_train_unet_only": False}
    word = {**plain, "token_string": "picture", "num_vectors_per_token": 2, "init_word": "a b"}
    run.train(prepared.options(before, output_dir=str(tmp_path), **word), "embedding", prepared.data(before))
    word |= {"resume": str(tmp_path / "out-state")}
    monkeypatch.setattr(run, "settle", lambda *_: pytest.fail("weights were read"))
    for changed, says in (
        ({"num_vectors_per_token": 3}, r"clip_l.picture has the shape \(2, 64\) in it and \(3, 64\) in this run"),
        ({"token_string": "0"}, "2 weights are in it or in this run alone, such as clip_l.0; what is trained"),
        ({"xti": True}, r"and \(7, 2, 64\) in this run"),
    ):
        with pytest.raises(UserError, match=says):
            _resumed(before, tmp_path, "embedding", **{**word, **changed})
    monkeypatch.undo()
    _resumed(before, tmp_path, "embedding", **{**word, "init_word": "b"})
    assert "init_word b does not act: the weights are those of the state" in capsys.readouterr().err


def test_the_blocks_that_are_trained_cannot_change(before: Path, tmp_path: Path) -> None:
    parts, facts = runs.load_run(before / "first" / "out-state")
    facts["identity"]["adapter"] = None  # as of a whole model, but for its weights, which are not read
    runs.save_run(tmp_path / "full-state", parts, facts)
    with pytest.raises(UserError, match="num_last_block_to_freeze was not set and is now 2; it cannot change"):
        _resumed(before, tmp_path, "full", resume=str(tmp_path / "full-state"), num_last_block_to_freeze=2)


def test_other_weights_and_rates_are_refused_before_weights_are_read(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "settle", lambda *_: pytest.fail("weights were read"))
    parts, facts = runs.load_run(before / "first" / "out-state")
    facts["identity"]["adapter"] = None
    runs.save_run(tmp_path / "other-state", parts, facts)
    with pytest.raises(UserError, match=r"in it or in this run alone, such as .*; what is trained cannot change"):
        _resumed(before, tmp_path, "full", resume=str(tmp_path / "other-state"))
    facts["identity"]["adapter"] = runs.load_run(before / "first" / "out-state")[1]["identity"]["adapter"]
    name, cut = next((name, t[:1]) for name, t in parts["weights"].items() if t.shape[0] > 1)
    parts["weights"][name] = cut
    runs.save_run(tmp_path / "other-state", parts, facts)
    with pytest.raises(UserError, match=rf"{name} has the shape \({cut.shape[0]}, .*; it cannot change"):
        _resumed(before, tmp_path, resume=str(tmp_path / "other-state"))


def test_a_file_to_start_from_does_not_act() -> None:
    then, now = (
        {"config": resume.as_json(asdict(config(**options))), "precision": "no", "base": {}}
        for options in ({}, {"controlnet_model_name_or_path": "a"})
    )
    assert resume.changes(then, now, torch.optim.AdamW) == [
        "controlnet_model_name_or_path a does not act: the weights are those of the state"
    ]


def test_a_state_that_is_not_whole_is_refused_before_weights_are_read(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "settle", lambda *_: pytest.fail("weights were read"))
    state = Path(shutil.copytree(before / "first" / "out-state", tmp_path / "cut-state"))
    os.truncate(state / "weights.safetensors", 20)
    with pytest.raises(UserError, match=r"cut-state: cannot resume from this state: weights\.safetensors has 20 bytes"):
        _resumed(before, tmp_path, resume=str(state))


def test_prodigys_start_cannot_be_changed_later() -> None:
    from pytorch_optimizer import Prodigy

    from sfumato.train.resume import changed_args

    then, now = ({"optimizer": {"optimizer_args": [arg]}} for arg in ("d_coef=1.0", "d_coef=2.0"))
    assert changed_args(then, now, Prodigy) == {"d_coef": (1.0, 2.0)}
    with pytest.raises(UserError, match="d0: it acts when a run begins"):
        changed_args(then, {"optimizer": {"optimizer_args": ["d_coef=1.0", "d0=1e-5"]}}, Prodigy)


def test_a_state_of_before_the_settings_were_kept_resumes(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, facts = runs.load_run(before / "first" / "out-state")
    new = ("identity", "optimizer_class", "datasets", "steps", "carried")
    runs.save_run(tmp_path / "old-state", parts, {name: value for name, value in facts.items() if name not in new})
    a_run = _resumed(before, tmp_path, resume=str(tmp_path / "old-state"), optimizer_args=("weight_decay=0.5",))
    assert "what has changed since then is not known" in capsys.readouterr().err
    assert a_run.optimizer.param_groups[0]["weight_decay"] == 0.5
    with pytest.raises(UserError, match=r"AdaFactor needs .*row"):
        _resumed(before, tmp_path, resume=str(tmp_path / "old-state"), optimizer_type="AdaFactor", optimizer_args=())
