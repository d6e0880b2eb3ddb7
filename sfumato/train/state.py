"""A run's state on disk: what must be saved so that a resumed run equals an unbroken one.

Schedule and randomness follow from the step alone, so the weights, the optimizer, their average and the
step are all there is.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import run as runs
from sfumato.formats.files import check_finite
from sfumato.optim import build
from sfumato.train import resume as resuming
from sfumato.train.loop import Run
from sfumato.train.progress import console


def save(run: Run, folder: Path) -> None:
    """Write the state into `folder`."""
    if run.fused:
        run.fused.settle()
    packed, moments = runs.pack(run.optimizer.state_dict())
    parts: dict[str, dict[str, Tensor]] = {
        "weights": {name: p.detach() for name, p in run.trainable.weights().items()},
        "optimizer": moments,
    }
    if run.ema:
        parts["ema"] = run.ema.state()
    for name in ("weights", "ema"):
        check_finite(parts.get(name, {}), f"{folder.name} ({name})")
    facts = {
        "step": run.step,
        "steps": run.budget.steps,
        "optimizer": packed,
        "optimizer_class": resuming.path_of(run.optimizer),
        "scaler": run.scaler.state_dict(),
        "steps_per_epoch": run.budget.steps_per_epoch,
        "dataset": run.plan.digest(),
        "datasets": resuming.as_json([asdict(d) for d in run.plan.datasets]),
        "seed": run.config.train.seed,
        "identity": run.identity,
        "carried": run.trainable.frozen_digest(),
        "best": run.validation.state() if run.validation else None,
    }
    runs.save_run(folder, parts, facts)


def resume(run: Run) -> None:
    """Load the state in the folder that the config names, if it names one, and print what is different now."""
    if run.config.output.resume is None:
        if run.budget.first:
            run.step = run.start_step = run.budget.first
            run.schedule.to(run.step)
        return
    folder = Path(run.config.output.resume)
    parts, facts = runs.load_run(folder)
    try:
        _load_weights(run, parts["weights"])
        _load_optimizer(run, facts, parts["optimizer"])
        _load_average(run, parts.get("ema"))
        # A scale that was not in use has no state, and starts anew.
        if facts["scaler"]:
            run.scaler.load_state_dict(facts["scaler"])
        run.step = run.start_step = int(facts["step"])
        if run.validation and facts.get("best"):
            run.validation.resume(facts["best"])
        notices = _differences(run, facts)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"resume {folder}: the state does not fit this run ({error}); was the optimizer or the network changed?"
        ) from error
    run.schedule.to(run.step)
    for notice in notices:
        console.print(f"resume: {notice}")
    console.print(f"resume: {folder}, going on after step {run.step} of {run.budget.steps}")


def _load_optimizer(run: Run, facts: dict[str, Any], moments: dict[str, Tensor]) -> None:
    """The state's moments, with the arguments that were changed since: loading puts the old ones back."""
    own = [dict(group) for group in run.optimizer.param_groups]
    saved = runs.unpack(facts["optimizer"], moments)
    for group, current in zip(saved["param_groups"], own, strict=True):
        # The state may be of a machine with another device.
        group.update({name: current[name] for name in build.HOW if name in current})
    with run.fused.loading() if run.fused else nullcontext():
        run.optimizer.load_state_dict(saved)
    then = (facts.get("identity") or {}).get("config")
    changed = resuming.changed_args(then, resuming.as_json(asdict(run.config)), type(run.optimizer))
    for group, current in zip(run.optimizer.param_groups, own, strict=True):
        group.update({name: current[name] for name in changed if name in current})


def _load_average(run: Run, saved: dict[str, Tensor] | None) -> None:
    """The state's moving average, or a new one of the weights as they are now."""
    if run.ema and saved:
        run.ema.load(saved)
    elif run.ema:
        run.ema = run.ema.anew(run.trainable.weights())


@torch.no_grad()
def _load_weights(run: Run, saved: dict[str, Tensor]) -> None:
    own = run.trainable.weights()
    if odd := sorted(own.keys() ^ saved.keys()):
        raise ValueError(f"{len(odd)} weights are in one of them only, such as {odd[0]}")
    for name, parameter in own.items():
        if parameter.shape != saved[name].shape:
            raise ValueError(f"{name} has shape {tuple(saved[name].shape)} there and {tuple(parameter.shape)} here")
        parameter.copy_(saved[name])


def _differences(run: Run, facts: dict[str, Any]) -> list[str]:
    """What only the images show, and what a state of an older sfumato records. Errors: `ValueError` if what is not
    trained differs."""
    if facts.get("carried", "") != run.trainable.frozen_digest():
        raise ValueError(
            "the parts of network_weights that are not trained have changed; give the file that the run began with"
        )
    return resuming.image_changes(run.config, facts, run.plan, run.budget.steps_per_epoch, run.budget.steps)
