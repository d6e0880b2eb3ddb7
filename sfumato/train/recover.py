"""Out of memory while training: the step that failed is given up, the next stronger settings are taken, and the same
batches are trained on with these."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch.utils._python_dispatch import _disable_current_modes

from sfumato.adapters import AdapterPlan
from sfumato.config import Method
from sfumato.data.plan import Plan
from sfumato.errors import UserError
from sfumato.memory import swap_plan
from sfumato.memory.solve import Candidate, Levers, halves
from sfumato.models.base import Models
from sfumato.train import fusing, resume
from sfumato.train.devices import Placed, spare
from sfumato.train.fit import Forecast, host_room
from sfumato.train.loop import Run
from sfumato.train.progress import console
from sfumato.train.trainables import Trainable

LESS = 0.95
"""The share of what was predicted, and was too much, that the next settings may take."""


@dataclass(slots=True)
class Recovery:
    """Turns the levers of a run that change none of its numbers further, one failure after another."""

    method: Method
    plan: AdapterPlan | None
    images: Plan
    models: Models
    trainable: Trainable
    placed: Placed
    given: Collection[str] = ()

    def __call__(self, run: Run, why: str) -> None:
        """Have the run go on with less memory. Errors: `UserError` if there is nothing left that would help."""
        free(run)
        with _disable_current_modes():  # tensors without values are not to be counted
            forecast = Forecast(
                run.config, self.method, self.plan, self.images, self.given, card=run.world.device.type != "cpu"
            )
            now = forecast.now()
            found, spent = stronger(forecast, now), forecast.of(now).device
        if found is None:
            raise UserError(
                f"out of memory in step {run.step + 1} ({why}), with {now}: nothing is left that needs less memory and "
                "gives the same numbers; smaller images (resolution), a smaller network_dim, or quantize need less"
            )
        settings = found.levers.settings(forecast.largest.count)
        del settings["quantize"]
        if now.swapped == found.levers.swapped:
            del settings["blocks_to_swap"]
        else:
            settings |= dict.fromkeys(swap_plan.LISTS)
        if now.micro == found.levers.micro:
            settings["micro_batch"] = run.config.memory.micro_batch
        config = replace(run.config, memory=replace(run.config.memory, **settings))
        if replace(now, micro=found.levers.micro) != found.levers or now.offloaded or now.swapped:
            # What the failed step left in its queues goes with what made them.
            self.placed.remove()
            self.placed = spare(config, self.models, self.trainable, run.world.device)
            run.swaps = self.placed.swaps
            if run.fused:
                run.fused.before.clear()
                run.fused.after.clear()
            fusing.streamed(run)
            fusing.average(run)
        run.config, run.predicted = config, found.device
        run.identity = resume.identity(config, self.plan, self.models.source)
        if run.world.main:
            console.print(
                f"out of memory in step {run.step + 1}: the step is done again with {found.levers}, which needs about "
                f"{1 - found.device / spent:.0%} less of the card's memory and gives the same numbers"
            )


def stronger(forecast: Forecast, now: Levers) -> Candidate | None:
    """The fastest settings that need clearly less than those of now, and for which the host has room; None: there
    are none."""
    before = forecast.of(now)
    most, room = LESS * before.device, max(host_room(), before.host)
    tried = map(forecast.of, _further(forecast, now))
    found = [c for c in tried if c.device <= most and c.host <= room]
    return min(found, key=lambda c: (c.seconds, c.device), default=None)


def _further(forecast: Forecast, now: Levers) -> Iterator[Levers]:
    """Each lever as it is or further on."""
    everies = {now.every, 1} if now.every is None or now.every > 1 else {1}
    asides = {now.offloaded, True}
    micros = [n for n in halves(forecast.largest.count) if n <= now.micro]
    swaps = range(now.swapped, forecast.blocks) if forecast.method != "full" else [now.swapped]
    for every, aside, micro, swapped in product(everies, asides, micros, swaps):
        if not aside or every is not None:
            yield replace(now, every=every, offloaded=aside, micro=micro, swapped=swapped)


def free(run: Run) -> None:
    """Give up what a failed step left; the peak is measured anew."""
    run.optimizer.zero_grad(set_to_none=True)
    for weight in run.trainable.weights().values():
        weight.grad = None
    if run.scaler.is_enabled():
        run.scaler._per_optimizer_states.clear()  # the step may have got as far as its gradients' scale
    gc.collect()
    if run.tracker:
        run.tracker.reset()
    elif run.world.device.type not in ("cpu", "mps"):
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
