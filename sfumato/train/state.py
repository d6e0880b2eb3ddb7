"""A run's state on disk: what must be kept so that a resumed run equals an unbroken one.

Schedule and randomness follow from the step alone, so the weights, the optimizer, their average and the
step are all there is.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import run as runs
from sfumato.formats.files import check_finite
from sfumato.optim.ema import EMA
from sfumato.train import resume as resuming
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
    for name in ("weights", "ema"):
        check_finite(parts.get(name, {}), f"{folder.name} ({name})")
    facts = {
        "step": course.done,
        "steps": course.pace.steps,
        "optimizer": packed,
        "optimizer_class": resuming.path_of(course.optimizer),
        "scaler": course.scaler.state_dict(),
        "steps_per_epoch": course.pace.steps_per_epoch,
        "dataset": course.plan.digest(),
        "datasets": resuming.as_json([asdict(d) for d in course.plan.datasets]),
        "seed": course.config.train.seed,
        "identity": course.identity,
        "carried": course.trainable.carries(),
    }
    runs.save_run(folder, parts, facts)


def resume(course: Course) -> None:
    """Take up the state in the folder that the config names, if it names one. Says what is different now."""
    if course.config.output.resume is None:
        return
    folder = Path(course.config.output.resume)
    parts, facts = runs.load_run(folder)
    try:
        _load_weights(course, parts["weights"])
        _load_optimizer(course, facts, parts["optimizer"])
        _load_average(course, parts.get("ema"))
        # A scale that was not in use has no state, and starts anew.
        if facts["scaler"]:
            course.scaler.load_state_dict(facts["scaler"])
        course.done = course.started = int(facts["step"])
        notices = _differences(course, facts)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"resume {folder}: the state does not fit this run ({error}); was the optimizer or the network changed?") from error
    course.schedule.to(course.done)
    for notice in notices:
        console.print(f"resume: {notice}")
    console.print(f"resume: {folder}, going on after step {course.done} of {course.pace.steps}")


def _load_optimizer(course: Course, facts: dict[str, Any], moments: dict[str, Tensor]) -> None:
    """The state's moments, with the arguments that were changed since: loading puts the old ones back."""
    own = [dict(group) for group in course.optimizer.param_groups]
    course.optimizer.load_state_dict(runs.unpack(facts["optimizer"], moments))
    then = (facts.get("identity") or {}).get("config")
    changed = resuming.changed_args(then, resuming.as_json(asdict(course.config)), type(course.optimizer))
    for group, mine in zip(course.optimizer.param_groups, own, strict=True):
        group.update({name: mine[name] for name in changed if name in mine})


def _load_average(course: Course, saved: dict[str, Tensor] | None) -> None:
    """The state's moving average, or a new one of the weights as they are now."""
    if course.ema and saved:
        course.ema.load(saved)
    elif course.ema:
        course.ema = EMA(course.trainable.weights(), course.ema.decay)


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
    """What only the pictures tell, and what a state of an older sfumato says. Errors: `ValueError` if what is not trained is another."""
    if facts.get("carried", "") != course.trainable.carries():
        raise ValueError("the parts of network_weights that are not trained are other ones now; give the file of then")
    out = []
    if facts["dataset"] != course.plan.digest():
        out.append(f"the dataset has changed ({facts['steps_per_epoch']} steps an epoch then, {course.pace.steps_per_epoch} now)")
    if "identity" not in facts and facts["seed"] != course.config.train.seed:
        out.append(f"the seed was {facts['seed']} and is now {course.config.train.seed}")
    out += resuming.dataset_changes(facts.get("datasets", []), course.plan.datasets)
    return out + resuming.length_change(facts.get("steps"), course.pace.steps, course.config)
