"""A long run does not end, and loses nothing, for a small reason; and when it does end, what was trained is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Train

from sfumato.errors import UserError, WriteError
from sfumato.formats import files
from sfumato.formats.files import load
from sfumato.formats.run import newest
from sfumato.train import log, loop, run, trainables

Patch = pytest.MonkeyPatch
FAST: dict[str, Any] = {"cache_latents": True, "cache_text_encoder_outputs": True}


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def failing(real: Callable[..., Any], when: Callable[[int], bool], error: Exception) -> Callable[..., Any]:
    """The function, but an error at those of its calls (counted from 1) that `when` says."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if when(calls):
            raise error
        return real(*args, **kwargs)

    return call


def test_log_samples_and_curve_that_fail_are_reported_once_and_training_goes_on(
    train: Train, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1")
    monkeypatch.setattr(
        log.Lines, "write", failing(log.Lines.write, lambda call: call in (2, 3), OSError(errno.ENOSPC, "no room"))
    )
    monkeypatch.setattr(log, "curve", full)
    monkeypatch.setattr(run, "sample", failing(run.sample, lambda call: call > 1, RuntimeError("out of memory")))
    folder = train("a", **FAST, max_train_steps=4, sample_prompts=str(tmp_path / "prompts.txt"), sample_every_n_steps=1)
    assert load(folder / "out.safetensors")
    output = capsys.readouterr().err
    for text in (
        "lines of the log not written: [Errno 28] no room",
        "sample images not generated: out of memory",
        "curve of the loss not plotted",
    ):
        assert output.count(f"{text}") == 1, output
    assert len(list((folder / "sample").iterdir())) == 1
    assert [json.loads(line)["step"] for line in (folder / "out.jsonl").read_text().splitlines()] == [1, 4]


def test_a_result_that_does_not_fit_on_the_disk_is_reported_and_the_old_ones_stay(
    train: Train, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = trainables.Adapters.save

    def save(self: Any, path: Path, metadata: Any) -> None:
        if "step00000003" in path.name:
            raise WriteError(f"{path}: the disk is full")
        real(self, path, metadata)

    monkeypatch.setattr(trainables.Adapters, "save", save)
    folder = train("a", **FAST, max_train_steps=4, save_every_n_steps=1, save_last_n_steps=1, save_state=True)
    assert "out-step00000003 not saved whole: " in capsys.readouterr().err
    names = {p.name for p in folder.iterdir()}
    assert {f"out{n}.safetensors" for n in ("", "-step00000001", "-step00000002")} | {
        "out-state",
        "out-step00000003-state",
    } <= names
    assert "out-step00000003.safetensors" not in names


@pytest.mark.parametrize("asked", [True, False])
def test_an_error_after_step_1_saves_a_state_if_states_are_asked_for(
    train: Train, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str], asked: bool
) -> None:
    step = failing(loop._optimizer_step, lambda call: call == 3, RuntimeError("the card fell off"))
    monkeypatch.setattr(loop, "_optimizer_step", step)
    with pytest.raises(RuntimeError, match="the card fell off"):
        train("a", **FAST, max_train_steps=4, save_state_on_train_end=asked)
    states = list((tmp_path / "a").glob("*-state"))
    if not asked:
        assert not states
        return
    assert states == [tmp_path / "a" / "out-step00000002-state"]
    assert states[0] == newest(tmp_path / "a", "out.*")
    assert "the state after step 2, saved because of an error; go on with --resume auto" in capsys.readouterr().err


@pytest.mark.parametrize("why", ["not finite", "half a step"])
def test_weights_that_are_not_finite_or_of_half_a_step_are_not_saved_as_a_state(
    train: Train, tmp_path: Path, monkeypatch: Patch, why: str
) -> None:
    real = loop._optimizer_step

    def step(a_run: loop.Run, *args: Any) -> Any:
        if a_run.step < 1:
            return real(a_run, *args)
        if why == "not finite":
            next(iter(a_run.trainable.weights().values())).data.fill_(torch.nan)
        else:
            monkeypatch.setattr(a_run.trainable, "after_step", failing(len, lambda call: True, RuntimeError()))
            real(a_run, *args)
        raise RuntimeError

    monkeypatch.setattr(loop, "_optimizer_step", step)
    with pytest.raises(RuntimeError):
        train("a", **FAST, save_state=True)
    assert not list((tmp_path / "a").glob("*-state"))


def test_a_last_result_that_does_not_fit_is_saved_elsewhere(train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    real, spare = trainables.Adapters.save, tmp_path / "spare"
    monkeypatch.setattr(run.tempfile, "mkdtemp", lambda **_: str(spare))

    def save(self: Any, path: Path, metadata: Any) -> None:
        if path.parent != spare:
            raise WriteError(f"{path}: the disk is full")
        real(self, path, metadata)

    monkeypatch.setattr(trainables.Adapters, "save", save)
    with pytest.raises(UserError, match=r"the disk is full\nThe result was saved as .*spare.*out\.safetensors instead"):
        train("a", **FAST, max_train_steps=2, save_state=True)
    assert load(spare / "out.safetensors")
    assert (tmp_path / "a" / "out-step00000002-state").is_dir()


def test_what_save_precision_cannot_hold_is_reported_not_saved(
    train: Train, tmp_path: Path, monkeypatch: Patch
) -> None:
    real = trainables.Adapters.save

    def huge(self: Any, path: Path, metadata: Any) -> None:
        with torch.no_grad():
            next(iter(self.weights().values())).fill_(1e6)
        real(self, path, metadata)

    monkeypatch.setattr(trainables.Adapters, "save", huge)
    with pytest.raises(
        UserError,
        match=r"the adapter out\.safetensors: NaN or infinite values .* save_precision float16 may be too small",
    ):
        train("a", **FAST, save_precision="fp16", max_train_steps=1)
    assert not (tmp_path / "a" / "out.safetensors").exists()
    assert (tmp_path / "a" / "out-step00000001-state").is_dir(), (
        "the whole run is in it: it is kept though no state was asked for"
    )


@pytest.mark.parametrize("change", ["cut", "written over"])
def test_a_base_model_that_changes_while_a_whole_model_is_trained_gives_a_sentence(
    train: Train, model: Path, tmp_path: Path, monkeypatch: Patch, change: str
) -> None:
    base = Path(shutil.copy(model, tmp_path / "base.safetensors"))
    settings = {
        "pretrained_model_name_or_path": str(base),
        "tokenizer": str(model.parent / "tokenizer"),
        "max_train_steps": 2,
    }

    def changing(a_run: loop.Run, *args: Any, real: Any = loop._optimizer_step) -> Any:
        if a_run.step == 1:
            with base.open("r+b") as file:
                file.truncate(100_000) if change == "cut" else file.write(os.urandom(100_000))
            os.utime(base, (1, 1))
        return real(a_run, *args)

    monkeypatch.setattr(loop, "_optimizer_step", changing)
    with pytest.raises(UserError, match=r"base\.safetensors: changed while it was in use"):
        train("a", "full", **FAST, **settings, save_state_on_train_end=True)
    assert not (tmp_path / "a" / "out.safetensors").exists()
    assert (tmp_path / "a" / "out-step00000002-state").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="an open file keeps its name there")
def test_a_base_model_that_is_replaced_by_another_while_a_whole_model_is_trained_is_not_mixed_with_it(
    train: Train, model: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    whole = load(train("whole", "full", **FAST, max_train_steps=2) / "out.safetensors")
    base = Path(shutil.copy(model, tmp_path / "base.safetensors"))
    settings = {
        "pretrained_model_name_or_path": str(base),
        "tokenizer": str(model.parent / "tokenizer"),
        "max_train_steps": 2,
    }
    other = {name: t + 1 if t.is_floating_point() else t for name, t in load(model).items()}

    def replacing(a_run: loop.Run, *args: Any, real: Any = loop._optimizer_step) -> Any:
        if a_run.step == 1:
            files.save(base, other)
        return real(a_run, *args)

    monkeypatch.setattr(loop, "_optimizer_step", replacing)
    out = train("a", "full", **FAST, **settings) / "out.safetensors"
    assert all(torch.equal(t, whole[name]) for name, t in load(out).items())
    assert "ss_sd_model_hash" not in files.read_header(out).metadata


def test_a_second_run_of_the_same_name_is_refused(train: Train, monkeypatch: Patch) -> None:
    def second(*_: Any, real: Any = run.settle, **__: Any) -> Any:
        monkeypatch.setattr(run, "settle", real)
        with pytest.raises(UserError, match="another run"):
            train("a")
        raise UserError("seen")

    monkeypatch.setattr(run, "settle", second)
    with pytest.raises(UserError, match="seen"):
        train("a")


def test_the_users_own_config_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "out.toml").write_text("# my settings\n")
    with pytest.raises(UserError, match=r"out\.toml, which sfumato did not write"):
        train("a")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out.toml"]
