"""A run's state on disk: what must be kept so that a resumed run equals an unbroken one.

Schedule and randomness follow from the step alone, so the weights, the optimizer, their average and the
step are all there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import run as runs
from sfumato.train import keep
from sfumato.train.loop import Course
from sfumato.train.progress import console


def save(course: Course, folder: Path) -> None:
    """Write the state into `folder`."""
    packed, moments = runs.pack(course.optimizer.state_dict())
    parts: dict[str, dict[str, Tensor]] = {
        "weights": {name: p.detach() for name, p in course.trainable.weights().items()},
        "optimizer": moments,
    }
    if course.ema:
        parts["ema"] = course.ema.state()
    facts = {
        "step": course.done,
        "optimizer": packed,
        "scaler": course.scaler.state_dict(),
        "steps_per_epoch": course.pace.steps_per_epoch,
        "dataset": course.plan.digest(),
        "seed": course.config.train.seed,
    }
    runs.save_run(folder, parts, facts)


def resume(course: Course) -> None:
    """Take up the state that the config names, if it names one. Says what is different now."""
    folder = _find(course)
    if folder is None:
        return
    parts, facts = runs.load_run(folder)
    try:
        _load_weights(course, parts["weights"])
        course.optimizer.load_state_dict(runs.unpack(facts["optimizer"], parts["optimizer"]))
        if course.ema and "ema" in parts:
            course.ema.load(parts["ema"])
        course.scaler.load_state_dict(facts["scaler"])
        course.done = course.started = int(facts["step"])
    except (KeyError, ValueError) as error:
        raise UserError(f"resume {folder}: the state does not fit this run ({error}); was the optimizer or the network changed?") from error
    if course.done >= course.pace.steps:
        raise UserError(
            f"resume {folder}: {course.done} steps are done, of {course.pace.steps} in all; raise --max_train_steps or --max_train_epochs"
        )
    course.schedule.to(course.done)
    for notice in _differences(course, facts):
        console.print(f"resume: {notice}")
    console.print(f"resume: {folder}, going on after step {course.done} of {course.pace.steps}")


def _find(course: Course) -> Path | None:
    asked, output = course.config.output.resume, course.config.output
    if asked is None:
        return None
    if asked != "auto":
        return Path(asked)
    found = runs.newest(output.output_dir, keep.states_of(output.output_name))
    if found is None:
        console.print(f"resume auto: no state of {output.output_name!r} in {output.output_dir}; starting at step 0")
    return found


@torch.no_grad()
def _load_weights(course: Course, saved: dict[str, Tensor]) -> None:
    own = course.trainable.weights()
    if odd := sorted(own.keys() ^ saved.keys()):
        raise ValueError(f"{len(odd)} weights are in one of them only, such as {odd[0]}")
    for name, parameter in own.items():
        if parameter.shape != saved[name].shape:
            raise ValueError(f"{name} has shape {tuple(saved[name].shape)} there and {tuple(parameter.shape)} here")
        parameter.copy_(saved[name])


def _differences(course: Course, facts: dict[str, Any]) -> list[str]:
    out = []
    if facts["dataset"] != course.plan.digest():
        out.append(f"the dataset has changed ({facts['steps_per_epoch']} steps an epoch then, {course.pace.steps_per_epoch} now)")
    if facts["seed"] != course.config.train.seed:
        out.append(f"the seed was {facts['seed']} and is now {course.config.train.seed}")
    if bool(course.ema) != bool(course.config.optimizer.ema_decay):
        out.append("the moving average starts anew")
    return out
