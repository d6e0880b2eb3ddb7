"""The one loop: batches in, optimizer steps, and now and then a picture, a result or the run's state.

One clock, the optimizer step: schedule, intervals, file names and resuming read it alone.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.data.loader import Loader
from sfumato.data.plan import Plan, SampleRef
from sfumato.errors import UserError, WriteError
from sfumato.optim import build
from sfumato.optim.ema import EMA
from sfumato.train import checkpoints, diagnose
from sfumato.train.dist import World
from sfumato.train.log import Log
from sfumato.train.mishaps import Mishaps
from sfumato.train.progress import Bar, console
from sfumato.train.trainables import Trainable


@dataclass(frozen=True, slots=True)
class Pace:
    """How many optimizer steps there are. An incomplete last group of an epoch is a step as well."""

    batches: int
    """Batches an epoch, over all processes."""
    group: int
    """Batches an optimizer step: accumulation x processes."""
    steps: int
    """Optimizer steps in all."""

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches / self.group)

    @property
    def epochs(self) -> int:
        return math.ceil(self.steps / self.steps_per_epoch)

    @classmethod
    def of(cls, config: Config, batches: int, processes: int) -> Pace:
        t = config.train
        group = t.gradient_accumulation_steps * processes
        if batches < processes:
            raise UserError(f"{batches} batches an epoch are too few for {processes} processes; start fewer, or lower the batch size")
        steps = math.ceil(batches / group) * t.max_train_epochs if t.max_train_epochs else (t.max_train_steps or 1600)
        return cls(batches, group, steps)


@dataclass(slots=True)
class Course:
    """All that a run needs while it runs."""

    config: Config
    world: World
    pace: Pace
    plan: Plan
    loader: Loader
    trainable: Trainable
    step: nn.Module
    """`step.Step`, or DistributedDataParallel around it."""
    optimizer: torch.optim.Optimizer
    schedule: Any
    ema: EMA | None
    scaler: torch.amp.GradScaler
    log: Log | None
    draw: Callable[[int, int], None]
    """(step, epoch): draw the sample prompts."""
    save_result: Callable[[Path, int, int], None]
    """(path, step, epoch)."""
    save_state: Callable[[Path], None]
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What the run is, for its states: `resume.identity`."""
    began: float = field(default_factory=time.monotonic)
    done: int = 0
    """Optimizer steps done, those before a resume included."""
    started: int = 0
    """Optimizer steps done before this process."""
    first_step_after: float | None = None
    """Seconds from `began` to the end of the first step."""
    whole: bool = True
    """Whether the weights are those after `done` steps; not in the midst of a step's update."""
    mishaps: Mishaps = field(default_factory=Mishaps)


@dataclass(slots=True)
class Pending:
    """Losses that still lie on the device, so that no step waits for one to be read."""

    values: list[tuple[int, Tensor, Tensor, list[float]]] = field(default_factory=list)
    read: float = 0.0
    average: float = math.nan

    def add(self, step: int, loss: Tensor, norm: Tensor, rates: list[float]) -> None:
        self.values.append((step, loss, norm, rates))

    def flush(self, course: Course, epoch: int) -> None:
        """Read, check and write what has gathered."""
        if not self.values:
            return
        numbers = torch.stack([torch.stack((loss.detach().float(), norm.detach().float())) for _, loss, norm, _ in self.values]).tolist()
        for (step, _, _, rates), (loss, norm) in zip(self.values, numbers, strict=True):
            named = dict(zip([g["name"] for g in course.optimizer.param_groups], rates, strict=True))
            if not math.isfinite(loss):
                raise diagnose.lost(course, step, loss, named)
            self.average = loss if math.isnan(self.average) else 0.95 * self.average + 0.05 * loss
            if course.log:
                lrs = {f"lr/{n}": lr for n, lr in named.items()}
                course.log.write(step, loss=loss, grad_norm=norm, epoch=epoch + 1, **lrs)
        self.values.clear()
        self.read = time.monotonic()


class Interrupt:
    """The first Ctrl+C (or SIGTERM) is remembered and handled at the end of the step; the second one kills."""

    def __init__(self) -> None:
        self.asked = False
        self.old: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            # Only the main thread may listen; elsewhere (a notebook's worker, say) the default stays.
            try:
                self.old[number] = signal.signal(number, self._hear)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for n, handler in self.old.items():
            signal.signal(n, handler)


def run(course: Course) -> bool:
    """Train from `course.done` to the end; True when the end was reached, False after Ctrl+C."""
    pace, pending = course.pace, Pending()
    bar = Bar("training", pace.steps, course.done, quiet=not course.world.main)
    course.optimizer.zero_grad(set_to_none=True)
    if course.done == 0 and course.config.sample.sample_at_first:
        _sample(course, 0)
    try:
        with Interrupt() as interrupt:
            for epoch in range(course.done // pace.steps_per_epoch, pace.epochs):
                for loss, norm, rates in _epoch(course, epoch):
                    pending.add(course.done, loss, norm, rates)
                    stop = course.world.agree(interrupt.asked)
                    duty = _duties(course, epoch)
                    if duty or stop or course.done == pace.steps or time.monotonic() - pending.read > 0.5:
                        pending.flush(course, epoch)
                        bar.to(course.done, f"loss {pending.average:.4f}  {bar.speed():.2f} steps/s")
                    if course.first_step_after is None:
                        course.first_step_after = time.monotonic() - course.began
                    if duty:
                        duty()
                    if stop and course.done < pace.steps:
                        name = checkpoints.step_name(course.config.output.output_name, course.done)
                        _save(course, checkpoints.Saving(name, state=True), epoch, last=True)
                        return False
    except Exception:
        save_what_is_done(course)
        raise
    finally:
        bar.close()
    return True


def _epoch(course: Course, epoch: int) -> Iterator[tuple[Tensor, Tensor, list[float]]]:
    """The optimizer steps of an epoch that are still to do: mean loss, gradient norm and rates of each, once it is done."""
    pace = course.pace
    batches = course.plan.batches(epoch, course.config.train.seed)
    first = course.done - epoch * pace.steps_per_epoch
    turns = first * course.config.train.gradient_accumulation_steps
    mine = course.loader.epoch(epoch, start_batch=turns, rank=course.world.rank, world=course.world.size)
    for group in range(first, pace.steps_per_epoch):
        if course.done >= pace.steps:
            return
        told = _optimizer_step(course, mine, batches[group * pace.group : (group + 1) * pace.group])
        rates = build.rates(course.optimizer)
        course.schedule.step()
        course.done += 1
        course.whole = True
        yield (*told, rates)


def _optimizer_step(course: Course, mine: Iterator[Batch], refs: list[tuple[SampleRef, ...]]) -> tuple[Tensor, Tensor]:
    """One step on the batches `refs`, shared out over the processes; every sample weighs the same."""
    world, samples = course.world, sum(len(batch) for batch in refs)
    rounds = math.ceil(len(refs) / world.size)
    total = torch.zeros((), device=world.device)
    for i in range(rounds):
        batch = next(mine).to(world.device)
        with _exchange(course.step, last=i == rounds - 1):
            cost = course.step(batch)
            # DistributedDataParallel averages over the processes; the sum over all samples is what is wanted.
            course.scaler.scale(cost * (world.size / samples)).backward()
        total += cost.detach() / samples
    if world.size > 1:
        torch.distributed.all_reduce(total)
    return total, _update(course)


def _exchange(step: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    return nullcontext() if last or not isinstance(step, DistributedDataParallel) else step.no_sync()


def _update(course: Course) -> Tensor:
    """Clip, step, average; returns the gradient norm."""
    weights = course.trainable.weights()
    course.scaler.unscale_(course.optimizer)
    limit = course.config.optimizer.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), limit if limit > 0 else math.inf)
    course.whole = False
    course.scaler.step(course.optimizer)
    course.scaler.update()
    course.optimizer.zero_grad(set_to_none=True)
    course.trainable.after_step()
    if course.ema:
        course.ema.update(weights)
    return norm


def _duties(course: Course, epoch: int) -> Callable[[], None] | None:
    """What is due after the step just done, or None."""
    output, sample, pace, step = course.config.output, course.config.sample, course.pace, course.done
    ended = step == min((epoch + 1) * pace.steps_per_epoch, pace.steps)
    savings = [
        checkpoints.after_step(output, step) if step < pace.steps else None,
        checkpoints.after_epoch(output, epoch + 1, pace.epochs) if ended else None,
    ]
    every, epochs = sample.sample_every_n_steps, sample.sample_every_n_epochs
    draws = (every and step % every == 0) or (epochs and ended and (epoch + 1) % epochs == 0)
    freeze = course.config.train.stop_text_encoder_training == step
    if not (any(savings) or draws or freeze):
        return None

    def duty() -> None:
        for saving in savings:
            if saving:
                _save(course, saving, epoch)
        if draws:
            _sample(course, epoch)
        if freeze:
            course.trainable.freeze_encoders()

    return duty


def _save(course: Course, saving: checkpoints.Saving, epoch: int, *, last: bool = False) -> None:
    """Save what is due. What cannot be written (a full disk) is told, and training goes on: the old results are untouched, none is
    removed, and there may be room when the next is due. `last`: nothing comes after it, so errors are raised, once all is tried."""
    folder = Path(course.config.output.output_dir)
    if course.world.main:
        suffix, failed = course.trainable.suffix(), list[WriteError]()
        for job in (partial(_save_result, course, folder / f"{saving.name}{suffix}", epoch), partial(_save_state, course, saving)):
            try:
                job()
            except WriteError as error:
                failed.append(error)
        if last and failed:
            raise WriteError(*(str(each) for each in failed))
        for each in failed:
            course.mishaps.tell(f"{saving.name} not saved whole", each)
        if not failed:
            checkpoints.clean(saving, folder, suffix)
    course.world.wait()


def _save_result(course: Course, path: Path, epoch: int) -> None:
    with finished(course):
        course.save_result(path, course.done, epoch)


def _save_state(course: Course, saving: checkpoints.Saving) -> None:
    if saving.state:
        course.save_state(Path(course.config.output.output_dir) / checkpoints.state_name(saving.name))


def save_what_is_done(course: Course, *, anyway: bool = False) -> None:
    """After an error: the state of the run, if states are asked for and there are whole steps that none holds yet. Says where it is.

    `anyway`: even if none is asked for.
    """
    output = course.config.output
    if (
        not course.world.main
        or not course.whole
        or course.done <= course.started
        or not (anyway or output.save_state or output.save_state_on_train_end)
    ):
        return
    folder = Path(output.output_dir) / checkpoints.state_name(checkpoints.step_name(output.output_name, course.done))
    try:
        course.save_state(folder)
        console.print(f"{folder}: the state after step {course.done}, saved because of an error; go on with --resume auto")
    except Exception as error:  # the first error is what is raised
        console.print(f"{folder}: the state after step {course.done} could not be saved ({error})")


def _sample(course: Course, epoch: int) -> None:
    """Sample images. A failure ends the run only before its first step, when nothing is lost and the settings may be wrong."""
    if course.world.main:
        with course.mishaps.survived("sample images not drawn") if course.done else nullcontext(), finished(course):
            course.draw(course.done, epoch)
    course.world.wait()


@contextmanager
def finished(course: Course) -> Iterator[None]:
    """The weights as they would be saved: the optimizer's evaluation weights, or their average; dropouts off."""
    with build.evaluating(course.optimizer), course.ema.applied(course.trainable.weights()) if course.ema else nullcontext():
        course.trainable.train(False)
        try:
            yield
        finally:
            course.trainable.train(True)
