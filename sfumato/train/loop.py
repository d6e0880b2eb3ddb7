"""The one loop: batches in, optimizer steps, and now and then images, a result or the run's state.

One clock, the optimizer step: schedule, intervals, file names and resuming read it alone.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.data.loader import Loader, StepBatches
from sfumato.data.plan import Plan
from sfumato.errors import UserError, WriteError
from sfumato.memory.swap import Swap
from sfumato.memory.tracker import Tracker
from sfumato.optim import build
from sfumato.optim.ema import EMA
from sfumato.optim.fused import FusedStep
from sfumato.train import checkpoints, diagnose, validate
from sfumato.train.dist import Vote, World
from sfumato.train.hub import Uploads
from sfumato.train.log import Log
from sfumato.train.mishaps import Mishaps
from sfumato.train.progress import Bar, console
from sfumato.train.trainables import Trainable
from sfumato.train.validate import Validation


@dataclass(frozen=True, slots=True)
class StepBudget:
    """How many optimizer steps there are. An incomplete last group of an epoch is a step as well."""

    batches: int
    """Batches an epoch, over all processes."""
    accumulation: int
    """Batches that each process takes for an optimizer step."""
    processes: int
    steps_per_epoch: int
    steps: int
    """Optimizer steps in all."""
    first: int = 0
    """Steps that count as done before the first one."""

    @property
    def epochs(self) -> int:
        return math.ceil(self.steps / self.steps_per_epoch)

    @classmethod
    def of(cls, config: Config, batches: int, processes: int) -> StepBudget:
        t = config.train
        if batches < processes:
            raise UserError(
                f"{batches} batches an epoch are too few for {processes} processes; start fewer, or lower the batch "
                "size"
            )
        an_epoch = math.ceil(batches / (t.gradient_accumulation_steps * processes))
        steps = an_epoch * t.max_train_epochs if t.max_train_epochs else (t.max_train_steps or 1600)
        first = t.initial_step or an_epoch * ((t.initial_epoch or 1) - 1)
        if first >= steps:
            raise UserError(
                f"initial_step, initial_epoch: {first} steps count as done, of {steps} in all; raise "
                "--max_train_steps or --max_train_epochs"
            )
        return cls(batches, t.gradient_accumulation_steps, processes, an_epoch, steps, first)

    def text(self) -> str:
        """In words."""
        done = f", of which {self.first} count as done; the optimizer starts anew" if self.first else ""
        return f"{self.steps} steps in {self.epochs} epochs{done}"


@dataclass(slots=True)
class Run:
    """All that a run needs while it runs."""

    config: Config
    world: World
    budget: StepBudget
    plan: Plan
    loader: Loader
    trainable: Trainable
    training_step: nn.Module
    """`step.Step`, or DistributedDataParallel around it."""
    optimizer: torch.optim.Optimizer
    schedule: Any
    ema: EMA | None
    scaler: torch.amp.GradScaler
    log: Log | None
    sample: Callable[[int, int], None]
    """(step, epoch): sample the prompts."""
    save_result: Callable[[Path, int, int], None]
    """(path, step, epoch)."""
    save_state: Callable[[Path], None]
    uploads: Uploads | None = None
    """What is saved goes there as well."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What the run is, for its states: `resume.identity`."""
    began: float = field(default_factory=time.monotonic)
    step: int = 0
    """Optimizer steps done, those before a resume included."""
    start_step: int = 0
    """Optimizer steps done before this process."""
    first_step_after: float | None = None
    """Seconds from `began` to the end of the first step."""
    whole: bool = True
    """Whether the weights are those after `step` steps; not in the midst of a step's update."""
    predicted: int | None = None
    """Bytes of the device that the run is expected to take; None: nothing was predicted."""
    tracker: Tracker | None = None
    """Counts tensors where the device is a CPU of which a limit is asked for."""
    recover: Callable[[Run, str], None] | None = None
    """(run, what was said): called when the card's memory did not suffice for a step, before that is tried again.
    Errors: `UserError` if nothing can be done."""
    mishaps: Mishaps = field(default_factory=Mishaps)
    fused: FusedStep | None = None
    """Where the optimizer steps in parts: while gradients come, or with its state on the host."""
    swaps: Sequence[Swap] = ()
    """What streams blocks."""
    validation: Validation | None = None
    """What measures held-out images, where there are some."""


@dataclass(slots=True)
class PendingMetrics:
    """Losses and other numbers that are still on the device, so that no step waits for one to be read."""

    values: list[tuple[int, dict[str, Tensor], list[float]]] = field(default_factory=list)
    read: float = 0.0
    average: float = math.nan

    def add(self, step: int, metrics: dict[str, Tensor], rates: list[float]) -> None:
        self.values.append((step, metrics, rates))

    def flush(self, run: Run, epoch: int) -> None:
        """Read, check and log what has gathered."""
        if not self.values:
            return
        numbers = torch.stack(
            [number.detach().float() for _, metrics, _ in self.values for number in metrics.values()]
        ).tolist()
        following = iter(numbers)
        for step, metrics, rates in self.values:
            found = dict(zip(metrics, following, strict=False))
            loss = found["loss"]
            named = dict(zip([g["name"] for g in run.optimizer.param_groups], rates, strict=True))
            if not math.isfinite(loss):
                raise diagnose.not_finite(run, step, loss, named)
            self.average = loss if math.isnan(self.average) else 0.95 * self.average + 0.05 * loss
            if run.log:
                lrs = {f"lr/{n}": lr for n, lr in named.items()}
                run.log.write(step, **found, epoch=epoch + 1, **lrs)
        self.values.clear()
        self.read = time.monotonic()


class Interrupt:
    """The first Ctrl+C (or SIGTERM) is remembered and handled at the end of the step; the second one kills."""

    def __init__(self) -> None:
        self.asked = False
        self.old: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            # Only the main thread may handle signals; elsewhere (a notebook's worker, say) the default stays.
            try:
                self.old[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for n, handler in self.old.items():
            signal.signal(n, handler)


def train(run: Run) -> bool:
    """Train from `run.step` to the end; True when the end was reached, False after Ctrl+C."""
    budget, pending, stops = run.budget, PendingMetrics(), Vote(run.world)
    bar = Bar("training", budget.steps, run.step, quiet=not run.world.main)
    run.optimizer.zero_grad(set_to_none=True)
    if run.config.output.resume is None:  # else it was measured before the state was saved
        _validate(run, -(-run.step // budget.steps_per_epoch) - 1)
    if run.config.sample.sample_at_first:
        _sample(run, max(0, -(-run.step // budget.steps_per_epoch) - 1))
    try:
        with Interrupt() as interrupt:
            for epoch in range(run.step // budget.steps_per_epoch, budget.epochs):
                with closing(_epoch(run, epoch)) as steps:
                    for metrics, rates in steps:
                        pending.add(run.step, metrics, rates)
                        stop = stops.said_yes(interrupt.asked, last=run.step == budget.steps)
                        actions = _due_actions(run, epoch)
                        if actions or stop or run.step == budget.steps or time.monotonic() - pending.read > 0.5:
                            pending.flush(run, epoch)
                            bar.to(run.step, f"loss {pending.average:.4f}  {bar.speed():.2f} steps/s")
                        if run.first_step_after is None:
                            run.first_step_after = time.monotonic() - run.began
                        if actions:
                            actions()
                        if stop and run.step < budget.steps:
                            name = checkpoints.step_name(run.config.output.output_name, run.step)
                            _save(run, checkpoints.SaveEvent(name, state=True), epoch, last=True)
                            return False
    except Exception:
        save_what_is_done(run)
        raise
    finally:
        run.loader.close()
        bar.close()
    return True


def _epoch(run: Run, epoch: int) -> Generator[tuple[dict[str, Tensor], list[float]], None, None]:
    """The optimizer steps of an epoch that are still to do: mean loss, gradient norm and the like, and the rates of
    each, once it is done."""
    budget = run.budget
    for batches in run.loader.epoch(epoch, start_step=run.step - epoch * budget.steps_per_epoch):
        if run.step >= budget.steps:
            return
        metrics = _optimizer_step(run, batches)
        rates = build.rates(run.optimizer)
        run.schedule.step()
        run.step += 1
        run.whole = True
        yield metrics, rates


def _optimizer_step(run: Run, batches: StepBatches) -> dict[str, Tensor]:
    """One step on batches that are shared out over the processes; every sample weighs the same. Returns the loss, the
    gradient norm, and what the trainable has to log."""
    if run.ema:
        run.ema.begin()
    loss, norm = _recovering(run, batches)
    _settle(run)
    if run.world.size > 1:
        torch.distributed.all_reduce(loss)
    metrics = {"loss": loss, "grad_norm": norm, **run.trainable.after_step()}
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.finish(run.trainable.weights())
    return metrics


def _recovering(run: Run, batches: StepBatches) -> tuple[Tensor, Tensor]:
    """Loss and gradient norm of a step; where the card's memory does not suffice, after what `run.recover` does.
    Errors: as that; `UserError` where weights have begun to change."""
    taken: list[Batch] = []
    while True:
        try:
            return _forward_to_update(run, batches, chain(list(taken), _kept(batches.batches, taken)))
        except torch.OutOfMemoryError as error:
            why = str(error).partition("\n")[0]
        # Here, where the failed step's frames are gone with the error, and what they held.
        if not run.whole:
            raise UserError(
                f"out of memory while the weights changed in step {run.step + 1} ({why}): they are partly those of the "
                "step before, and not saved. Go on from the last state that was saved, with a setting that needs less, "
                "such as optimizer_state_on_cpu or fused_backward_pass"
            )
        if run.recover is None:
            raise torch.OutOfMemoryError(why)
        run.recover(run, why)


def _kept(batches: Iterable[Batch], taken: list[Batch]) -> Iterator[Batch]:
    """The batches, which are noted as they are taken."""
    for batch in batches:
        taken.append(batch)
        yield batch


def _forward_to_update(run: Run, step: StepBatches, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    if fused := run.fused:
        twice, device = fused.twice(scaled=run.scaler.is_enabled()), run.world.device
        held = [batch.to(device) for batch in batches] if twice else batches
        return fused.step(partial(_backward, run, step, held), run.scaler, partial(_unwhole, run))
    return _backward(run, step, batches), _update(run)


def _backward(run: Run, step: StepBatches, batches: Iterable[Batch]) -> Tensor:
    """The gradients of a step; returns this process's share of the loss."""
    world, total = run.world, torch.zeros((), device=run.world.device)
    for number, batch in enumerate(batches, 1):
        parts = batch.to(world.device).split(run.config.memory.micro_batch)
        for part in parts:
            with _exchange(run, last=number == step.count and part is parts[-1]):
                cost = run.training_step(part)
                # DistributedDataParallel averages over the processes; the sum over all samples is what is wanted.
                run.scaler.scale(cost * (world.size / step.samples)).backward()
            total += cost.detach() / step.samples
    return total


def _exchange(run: Run, *, last: bool) -> AbstractContextManager[Any]:
    if run.fused:
        run.fused.last = last
    step = run.training_step
    return nullcontext() if last or not isinstance(step, DistributedDataParallel) else step.no_sync()


def _update(run: Run) -> Tensor:
    """Clip and step; returns the gradient norm."""
    run.scaler.unscale_(run.optimizer)
    limit = run.config.optimizer.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(run.trainable.weights().values(), limit if limit > 0 else math.inf)
    _unwhole(run)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return norm


def _settle(run: Run) -> None:
    """Weights of streamed blocks are where they wait, with the values of now."""
    for swap in run.swaps:
        swap.settle()


def _unwhole(run: Run) -> None:
    """The weights are about to change."""
    run.whole = False


def _due_actions(run: Run, epoch: int) -> Callable[[], None] | None:
    """What is due after the step just done, or None."""
    output, sample, budget, step = run.config.output, run.config.sample, run.budget, run.step
    ended = step == min((epoch + 1) * budget.steps_per_epoch, budget.steps)
    events = [
        checkpoints.after_step(output, step) if step < budget.steps else None,
        checkpoints.after_epoch(output, epoch + 1, budget.epochs) if ended else None,
    ]
    every, epochs = sample.sample_every_n_steps, sample.sample_every_n_epochs
    samples = (every and step % every == 0) or (epochs and ended and (epoch + 1) % epochs == 0)
    freeze = run.config.train.stop_text_encoder_training == step
    validates = run.validation and validate.due(run.config.validation, step, epoch + 1, budget.steps, ended=ended)
    if not (any(events) or samples or freeze or validates):
        return None

    def act() -> None:
        if validates:  # before a state is saved, which has it then
            _validate(run, epoch)
        for event in events:
            if event:
                _save(run, event, epoch)
        if samples:
            _sample(run, epoch)
        if freeze:
            run.trainable.freeze_encoders()

    return act


def _save(run: Run, event: checkpoints.SaveEvent, epoch: int, *, last: bool = False) -> None:
    """Save what is due. What cannot be written (a full disk) is reported, and training goes on: the old results are
    untouched, none is removed, and there may be room when the next is due. `last`: nothing comes after it, so errors
    are raised, once all is tried."""
    folder = Path(run.config.output.output_dir)
    if run.world.main:
        suffix, failed = run.trainable.suffix(), list[WriteError]()
        for job in (
            partial(_save_result, run, folder / f"{event.name}{suffix}", epoch),
            partial(_save_state, run, event),
        ):
            try:
                job()
            except WriteError as error:
                failed.append(error)
        if last and failed:
            raise WriteError(*(str(each) for each in failed))
        for each in failed:
            run.mishaps.report(f"{event.name} not saved whole", each)
        if not failed:
            checkpoints.clean(event, folder, suffix)
    run.world.wait()


def _save_result(run: Run, path: Path, epoch: int) -> None:
    with evaluation_weights(run):
        run.save_result(path, run.step, epoch)


def _save_state(run: Run, event: checkpoints.SaveEvent) -> None:
    if event.state:
        run.save_state(Path(run.config.output.output_dir) / checkpoints.state_name(event.name))


def save_what_is_done(run: Run, *, anyway: bool = False) -> None:
    """After an error: save the state of the run and print where, if states are asked for and there are whole steps that
    none holds yet.

    `anyway`: even if none is asked for.
    """
    output = run.config.output
    if (
        not run.world.main
        or not run.whole
        or run.step <= run.start_step
        or not (anyway or output.save_state or output.save_state_on_train_end)
    ):
        return
    folder = Path(output.output_dir) / checkpoints.state_name(checkpoints.step_name(output.output_name, run.step))
    try:
        run.save_state(folder)
        console.print(f"{folder}: the state after step {run.step}, saved because of an error; go on with --resume auto")
    except Exception as error:  # the first error is what is raised
        console.print(f"{folder}: the state after step {run.step} could not be saved ({error})")


def _sample(run: Run, epoch: int) -> None:
    """Sample images. A failure ends the run only before its first step, when nothing is lost and the settings may be
    wrong."""
    if run.world.main:
        with (
            run.mishaps.survived("sample images not generated") if run.step else nullcontext(),
            evaluation_weights(run),
        ):
            run.sample(run.step, epoch)
    run.world.wait()


def _validate(run: Run, epoch: int) -> None:
    """Measure held-out images, log it, and keep the result if it is the best so far. A failure ends the run only before
    its first step."""
    if run.validation is None:
        return
    begun = run.step > run.start_step
    with (
        run.mishaps.survived("held-out images not measured") if begun else nullcontext(),
        evaluation_weights(run),
    ):
        found = run.validation.measure(run.config.memory.micro_batch)
        if run.log:
            run.log.write(run.step, {"validation": found.details()}, epoch=epoch + 1, **found.scalars())
        if begun and run.validation.is_best(found, run.step) and run.config.validation.save_best and run.world.main:
            _save_best(run, epoch)
    run.world.wait()


def _save_best(run: Run, epoch: int) -> None:
    name = checkpoints.best_name(run.config.output.output_name)
    with run.mishaps.survived(f"{name} not saved", WriteError):
        run.save_result(Path(run.config.output.output_dir) / f"{name}{run.trainable.suffix()}", run.step, epoch)


@contextmanager
def evaluation_weights(run: Run) -> Iterator[None]:
    """The weights as they would be saved: the optimizer's evaluation weights, or their average; dropouts off."""
    each = run.fused.each if run.fused else build.at_once
    try:
        with build.evaluating(run.optimizer, each):
            _settle(run)
            with run.ema.applied(run.trainable.weights()) if run.ema else nullcontext():
                run.trainable.train(False)
                try:
                    yield
                finally:
                    run.trainable.train(True)
    finally:
        _settle(run)
