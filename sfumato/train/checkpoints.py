"""When results and run states are saved, under which names, and which old ones go.

Names and arithmetic are sd-scripts': `NAME-000004` (epoch), `NAME-step00000400`, `NAME` (the last), and the
same with `-state` for run states.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from sfumato.config import Method, OutputConfig
from sfumato.formats.folders import irreplaceable
from sfumato.train.progress import console


def ending(output: OutputConfig, method: Method, layout: str) -> str:
    """What follows a result's name; nothing for a folder. `layout`: the base model's own, "single_file" or
    "diffusers"."""
    asked = output.save_model_as or ("diffusers" if method == "full" and layout == "diffusers" else "safetensors")
    return "" if asked.startswith("diffusers") else f".{asked}"


def epoch_name(name: str, epoch: int) -> str:
    return f"{name}-{epoch:06d}"


def step_name(name: str, step: int) -> str:
    return f"{name}-step{step:08d}"


def best_name(name: str) -> str:
    return f"{name}-best"


def state_name(result: str) -> str:
    return f"{result}-state"


def states_of(name: str) -> str:
    """A pattern that fits the names of all states of results called `name`, and no other run's."""
    return re.escape(name) + r"(-\d{6}|-step\d{8})?-state"


@dataclass(frozen=True, slots=True)
class SaveEvent:
    """One thing to save now and what it makes superfluous."""

    name: str
    state: bool
    old_result: str | None = None
    old_state: str | None = None


def every_n_epochs(output: OutputConfig, epochs: int) -> int | None:
    """save_every_n_epochs, or what save_n_epoch_ratio makes of it."""
    if output.save_n_epoch_ratio:
        return max(1, math.floor(epochs / output.save_n_epoch_ratio))
    return output.save_every_n_epochs


def after_step(output: OutputConfig, step: int) -> SaveEvent | None:
    """What to save after this optimizer step."""
    every = output.save_every_n_steps
    if not every or step % every:
        return None

    def old(last: int | None) -> str | None:
        if not last:
            return None
        number = (step - last - 1) // every * every
        return step_name(output.output_name, number) if number > 0 else None

    state = output.save_last_n_steps if output.save_last_n_steps_state is None else output.save_last_n_steps_state
    return SaveEvent(step_name(output.output_name, step), output.save_state, old(output.save_last_n_steps), old(state))


def after_epoch(output: OutputConfig, epoch: int, epochs: int) -> SaveEvent | None:
    """What to save after this epoch (counted from 1); the last epoch is saved as the result itself."""
    every = every_n_epochs(output, epochs)
    if not every or epoch % every or epoch >= epochs:
        return None

    def old(last: int | None) -> str | None:
        number = epoch - every * last if last else 0
        return epoch_name(output.output_name, number) if number > 0 else None

    state = output.save_last_n_epochs if output.save_last_n_epochs_state is None else output.save_last_n_epochs_state
    return SaveEvent(
        epoch_name(output.output_name, epoch), output.save_state, old(output.save_last_n_epochs), old(state)
    )


def clean(event: SaveEvent, folder: Path, suffix: str) -> None:
    """Remove what has been replaced; called only when the new files stand."""
    if event.old_result:
        _remove(folder / f"{event.old_result}{suffix}")
    if event.old_state:
        _remove(folder / state_name(event.old_state))


def _remove(path: Path) -> None:
    """Remove an old result or state. What is not sfumato's stays; what cannot be removed is reported, and ends no
    run."""
    try:
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif not irreplaceable(path):
            shutil.rmtree(path)
    except OSError as error:
        console.print(f"{path}: could not be removed ({error.strerror})")
