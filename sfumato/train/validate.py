"""The loss on images that are held out of training: on the same noise each time, so that two numbers may be compared.

Each image is measured at the same few noise levels, evenly over the levels that the run trains on, so that the mean is
what its training loss would be. As many images that are trained on are measured beside, at the same levels: once the
two part, images are learned by heart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.config import ValidationConfig
from sfumato.data.batch import Batch
from sfumato.data.held_out import noise_seed
from sfumato.data.loader import Loader
from sfumato.data.plan import Plan
from sfumato.errors import UserError
from sfumato.models.base import Models
from sfumato.tensors.noise import Drawn, NoiseProcess
from sfumato.tensors.random import SampleRandom, key
from sfumato.train.dist import World
from sfumato.train.log import PREFIX
from sfumato.train.monitor import margin
from sfumato.train.progress import progress
from sfumato.train.step import Step, autocast

LEVELS = tuple((i + 0.5) / 8 for i in range(8))
"""Noise levels at which an image is measured: shares of those that are trained on that lie below."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured at one time: fp64, on the CPU."""

    held_out: Tensor
    """(n, levels) the loss of each held-out image at each level; NaN where an image could not be read."""
    trained: Tensor
    """(m, levels) the same of images that are trained on."""

    @property
    def mean(self) -> float:
        """The mean loss of held-out images."""
        return float(self.held_out.nanmean())

    def scalars(self) -> dict[str, float]:
        """What is logged, by name."""
        images = self.samples()
        found = {"mean": self.mean, "trained": float(self.trained.nanmean())}
        if len(images) > 1:
            found["ci95"] = margin(images.tolist())
        found |= {f"level_{i}": float(loss) for i, loss in enumerate(self.held_out.nanmean(0), 1)}
        return {f"{PREFIX}{name}": value for name, value in found.items()}

    def details(self) -> dict[str, Any]:
        """What is logged besides, as JSON: the loss of each held-out image, and of the trained ones at each level."""
        rounded = [None if math.isnan(x) else float(f"{x:.6g}") for x in self.held_out.mean(1).tolist()]
        return {"held_out": rounded, "trained_levels": self.trained.nanmean(0).tolist()}

    def samples(self) -> Tensor:
        """(n,) the mean loss of each held-out image that could be read."""
        means = self.held_out.mean(1)
        return means[~means.isnan()]


@dataclass(slots=True, kw_only=True)
class Validation:
    """Measures what a plan holds out."""

    plan: Plan
    """The images that are measured: `data.held_out.evaluation`."""
    loader: Loader
    step: Step
    models: Models
    process: NoiseProcess
    world: World
    best: tuple[float, int] | None = None
    """The lowest mean loss after a step, and that step."""
    _places: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        seed = noise_seed(self.plan)
        self._places = {item.key(seed, 0, 0): i for i, item in enumerate(self.plan.items)}

    def measure(self, most: int | None) -> Evaluation:
        """Measure all images; every process is to call it. `most`: samples that are computed together. Errors: as of
        what makes batches, in all processes."""
        # (images, levels), and how often each was measured
        found = torch.zeros(len(self.plan.items), len(LEVELS) + 1, dtype=torch.float64)
        wrong: Exception | None = None
        try:
            self._measure(found, most)
        except Exception as error:
            wrong = error
        found = self._together(found, wrong)
        loss = found[:, :-1] / found[:, -1:]  # 0 / 0: NaN
        held = len(self.plan.held_out)
        return Evaluation(loss[:held], loss[held:])

    def is_best(self, found: Evaluation, step: int) -> bool:
        """Whether no loss was lower after an earlier step; it is then the one that others are compared with."""
        if self.best is not None and not found.mean < self.best[0]:
            return False
        self.best = (found.mean, step)
        return True

    def state(self) -> list[Any]:
        """What a resumed run needs: the best so far, and of which images, in JSON's values."""
        return [*(self.best or (None, None)), self.plan.digest()]

    def resume(self, saved: Sequence[Any]) -> None:
        """Go on from `state`; the best of other images says nothing of these."""
        loss, step, images = saved
        if loss is not None and images == self.plan.digest():
            self.best = (float(loss), int(step))

    @torch.no_grad()
    def _measure(self, found: Tensor, most: int | None) -> None:
        done, total = 0, self.plan.batches_per_epoch
        try:
            with progress("validating", quiet=not self.world.main) as advance:
                for step in self.loader.epoch(0):
                    for batch in step.batches:
                        for part in batch.split(most):
                            self._add(found, part)
                        done += self.world.size
                        advance(min(done, total), total)
        finally:
            self.loader.close()

    def _add(self, found: Tensor, batch: Batch) -> None:
        """Add the losses of a batch at each level."""
        device = self.world.device
        known = encoded(self.step, batch.to(device))
        losses = []
        for level in LEVELS:
            drawn = self._drawn(batch, level)
            losses.append(self.step.losses(replace(known, drawn={name: t.to(device) for name, t in drawn.items()})))
        rows = torch.tensor([self._places[each] for each in batch.keys])
        seen = torch.stack([*losses, known.weight], 1).double().cpu()  # (b, levels + 1)
        seen = seen.nan_to_num(nan=math.inf, posinf=math.inf)
        # Of an image that cannot be read zeros were measured, which weigh nothing whatever their loss.
        found.index_add_(0, rows, torch.where(batch.weight[:, None] > 0, seen, 0.0))

    def _drawn(self, batch: Batch, level: float) -> Drawn:
        """The noise of a batch at a level. Nothing else is left to chance, as when images are sampled."""
        latents = self.models.family.latents
        shape = latents.channels, *(side // latents.stride for side in batch.sizes[0, 4:].tolist())
        return self.process.draw(shape, SampleRandom([key(each, f"level {level}") for each in batch.keys]), level)

    def _together(self, found: Tensor, wrong: Exception | None) -> Tensor:
        """The sum over all processes. Errors: `wrong`; `UserError` if another process had one."""
        if self.world.size > 1:
            failed = torch.tensor(float(wrong is not None))
            torch.distributed.all_reduce(failed)
            torch.distributed.all_reduce(found)
            if failed.item() and wrong is None:
                raise UserError("another process could not measure its share")
        if wrong is not None:
            raise wrong
        return found


def due(config: ValidationConfig, step: int, epoch: int, steps: int, *, ended: bool) -> bool:
    """Whether to measure after this optimizer step, of `steps`, in this epoch (counted from 1). `ended`: it is the
    epoch's last."""
    every, epochs = config.validate_every_n_steps, config.validate_every_n_epochs
    if epochs is None and every is None:
        epochs = 1
    return bool(step == steps or (every and step % every == 0) or (epochs and ended and epoch % epochs == 0))


def encoded(step: Step, batch: Batch) -> Batch:
    """The batch with its latents and cond, so that they are not made for each level."""
    step.unowned[1].on_batch(batch)
    with autocast(batch.weight.device, step.precision) if batch.cond is None else nullcontext():
        cond = step.cond(batch)
    return replace(batch, latents=step.latents(batch), pixels=None, cond=cond, tokens=None)
