"""Which results stay, as the help texts of save_last_n_steps and save_last_n_epochs say it; and that nothing else is removed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato.config import OutputConfig
from sfumato.formats import run
from sfumato.train import checkpoints


def left(folder: Path, output: OutputConfig, *, steps: int = 0, epochs: int = 0) -> set[int]:
    """Numbers of the results that stay after so many steps or epochs."""
    savings = [checkpoints.after_step(output, n + 1) for n in range(steps)] + [
        checkpoints.after_epoch(output, n + 1, epochs + 1) for n in range(epochs)
    ]
    for saving in savings:
        if saving:
            (folder / saving.name).write_text("")
            checkpoints.clean(saving, folder, "")
    return {int(path.name[-6:]) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("every", "last", "steps", "kept"),
    [
        (10, 30, 50, {20, 30, 40, 50}),
        (1, 2, 9, {7, 8, 9}),
        (2, 2, 9, {6, 8}),
        (3, 2, 9, {9}),
        (10, 25, 57, {30, 40, 50}),
    ],
)
def test_save_last_n_steps_keeps_what_is_at_most_n_steps_old_as_sd_scripts_does(
    every: int, last: int, steps: int, kept: set[int], tmp_path: Path
) -> None:
    newest = max(kept)
    assert kept == {n for n in range(every, steps + 1, every) if newest - n <= last}  # the help text
    assert left(tmp_path, OutputConfig(save_every_n_steps=every, save_last_n_steps=last), steps=steps) == kept


@pytest.mark.parametrize(("every", "last", "kept"), [(1, 2, {8, 9}), (2, 3, {4, 6, 8}), (4, 1, {8})])
def test_save_last_n_epochs_keeps_the_last_n_results_as_sd_scripts_does(
    every: int, last: int, kept: set[int], tmp_path: Path
) -> None:
    assert len(kept) == last  # the help text
    assert left(tmp_path, OutputConfig(save_every_n_epochs=every, save_last_n_epochs=last), epochs=9) == kept


def test_only_results_and_states_of_sfumato_are_removed(tmp_path: Path) -> None:
    run.save_run(tmp_path / "me-step00000001-state", {"a": {"x": torch.ones(1)}}, {"step": 1})
    (tmp_path / "me-step00000001.safetensors").write_text("old")
    for name in ("me-step00000002.safetensors", "me-step00000002-state"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_text("mine")
    for step in ("me-step00000001", "me-step00000002", "me-step00000003"):
        checkpoints.clean(checkpoints.SaveEvent("me", True, step, step), tmp_path, ".safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["me-step00000002-state", "me-step00000002.safetensors"]


def test_an_old_result_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def held(*_: object, **__: object) -> None:
        raise PermissionError(13, "another program holds it open")

    (tmp_path / "me.safetensors").touch()
    monkeypatch.setattr(Path, "unlink", held)
    checkpoints.clean(checkpoints.SaveEvent("me", False, "me"), tmp_path, ".safetensors")
    assert "me.safetensors: could not be removed (another program holds it open)" in capsys.readouterr().err
