"""Which results stay, as the help texts of save_last_n_steps and save_last_n_epochs say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.config import OutputConfig
from sfumato.train import keep


def left(folder: Path, output: OutputConfig, *, steps: int = 0, epochs: int = 0) -> set[int]:
    """Numbers of the results that stay after so many steps or epochs."""
    savings = [keep.after_step(output, n + 1) for n in range(steps)] + [keep.after_epoch(output, n + 1, epochs + 1) for n in range(epochs)]
    for saving in savings:
        if saving:
            (folder / saving.name).write_text("")
            keep.clean(saving, folder, "")
    return {int(path.name[-6:]) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("every", "last", "steps", "kept"),
    [(10, 30, 50, {20, 30, 40, 50}), (1, 2, 9, {7, 8, 9}), (2, 2, 9, {6, 8}), (3, 2, 9, {9}), (10, 25, 57, {30, 40, 50})],
)
def test_save_last_n_steps_keeps_what_is_at_most_n_steps_old_as_sd_scripts_does(
    every: int, last: int, steps: int, kept: set[int], tmp_path: Path
) -> None:
    newest = max(kept)
    assert kept == {n for n in range(every, steps + 1, every) if newest - n <= last}  # the help text
    assert left(tmp_path, OutputConfig(save_every_n_steps=every, save_last_n_steps=last), steps=steps) == kept


@pytest.mark.parametrize(("every", "last", "kept"), [(1, 2, {8, 9}), (2, 3, {4, 6, 8}), (4, 1, {8})])
def test_save_last_n_epochs_keeps_the_last_n_results_as_sd_scripts_does(every: int, last: int, kept: set[int], tmp_path: Path) -> None:
    assert len(kept) == last  # the help text
    assert left(tmp_path, OutputConfig(save_every_n_epochs=every, save_last_n_epochs=last), epochs=9) == kept
