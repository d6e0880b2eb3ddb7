"""A run from its config to its result: everything is put together here, once, in one order."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfumato.config import FOLLOWING, Config, DatasetConfig, Method
from sfumato.data.batch import Batch
from sfumato.data.held_out import noise_seed
from sfumato.data.loader import AHEAD, Loader
from sfumato.data.plan import Plan
from sfumato.errors import UserError, WriteError
from sfumato.formats import files
from sfumato.models.base import Models
from sfumato.models.loading import materialize, unload
from sfumato.optim import build, schedules
from sfumato.sampling.prompts import Prompt
from sfumato.sampling.sample import EncodedPrompts, encode_prompts, sample
from sfumato.tensors.noise import Drawn, NoiseProcess
from sfumato.train import (
    checkpoints,
    dist,
    fit,
    fusing,
    hub,
    lock,
    log,
    loop,
    measure,
    monitor,
    provenance,
    resume,
    state,
    trainables,
)
from sfumato.train.caching import Caches, Data, fill_caches, open_data
from sfumato.train.check import check, check_length, check_model
from sfumato.train.devices import outline_models, place_models, quantised_notes, read_models, settle
from sfumato.train.plan import steps_line
from sfumato.train.progress import console, progress
from sfumato.train.recover import Recovery
from sfumato.train.step import Step, autocast, draw
from sfumato.train.trainables import Trainable, caches_text
from sfumato.train.validate import Validation


def cache(config: Config, datasets: tuple[DatasetConfig, ...], method: Method = "network") -> Caches:
    """`sfumato cache`: fill the caches on disk and stop."""
    world = dist.world()
    try:
        models = outline_models(config)
        check_model(config, models)
        data = open_data(config, datasets, world, models, control=method in FOLLOWING)
        settle(config, models)
        return fill_caches(config, data, models, world)
    finally:
        world.close()


def train(
    config: Config,
    method: Method,
    datasets: tuple[DatasetConfig, ...],
    resolved: Callable[[Config], str] = lambda config: "",
    read: Sequence[Path] = (),
    given: Collection[str] = (),
) -> None:
    """Train and save. `resolved`: a whole config as TOML; that of this run, with all that was chosen for it, is written
    beside the result before the first step.

    `read`: the config files that the settings came from; `given`: those that the user set. Errors: `UserError` for
    whatever the user can fix.
    """
    began = time.monotonic()
    world = dist.world()
    folder, name = Path(config.output.output_dir), config.output.output_name
    try:
        measure.cap(config, world.device)
        with lock.alone(folder, name, main=world.main):
            run = prepare(config, method, datasets, world, began, read, given)
            with run.uploads or nullcontext():
                with run.log or nullcontext():
                    begun = run.config
                    if world.main:
                        files.write_text(folder / f"{name}.toml", resolved(begun))
                    with run.tracker or nullcontext():
                        ended = loop.train(run)
                    measure.log(run)
                    if world.main and run.config is not begun:  # it had to do with less memory
                        files.write_text(folder / f"{name}.toml", resolved(run.config))
                if world.main:
                    _finish(run, ended)
            for swap in run.swaps:
                swap.remove()  # no copy is on its way into memory that the next training in this process takes
            world.wait()
    finally:
        world.close()


def prepare(
    config: Config,
    method: Method,
    datasets: tuple[DatasetConfig, ...],
    world: dist.World,
    began: float,
    read: Sequence[Path] = (),
    given: Collection[str] = (),
) -> loop.Run:
    """Everything up to the first step, in this order: checks, images, model, caches, trainable, memory,
    optimizer, state."""
    precision = dist.precision(config.train.mixed_precision)
    config = resume.resolve_auto(config)
    checked = check(config, method, datasets, read)
    data = open_data(config, datasets, world, checked.models, control=method in FOLLOWING)
    found = fit.fitted(config, method, checked.plan, data.plan, given, card=world.device.type != "cpu")
    if found:
        config, checked = found.config, check(found.config, method, datasets, read)
    plan, models = checked.plan, checked.models
    budget = loop.StepBudget.of(config, data.plan.batches_per_epoch, world.size)
    if world.main:
        _say([*checked.notes, *check_length(config, budget.steps), *(found.notes if found else ())], data.plan, budget)
    settle(config, models, method)
    process = models.process(config.noise, config.loss)
    caches = fill_caches(config, data, models, world)
    samples = Samples(config, models, process, checked.prompts, world.device)
    _read(config, models, world)
    trainable = trainables.make(method, models, config, plan)
    placed = place_models(config, models, trainable, world.device)
    optimizer = _optimizer(config, trainable, world.device)
    step = Step(models, trainable, process, config.loss, precision)
    loader = _loader(config, data.plan, models, caches, budget, world, partial(draw, models, process))
    uploads = hub.uploads(config.hub, main=world.main)
    facts = provenance.Facts(config, models, data.plan, budget, plan, type(optimizer), trainable.kind)
    run = loop.Run(
        config=config, world=world, budget=budget, plan=data.plan, loader=loader, trainable=trainable,
        training_step=_distributed(step, trainable, world), optimizer=optimizer,
        schedule=schedules.schedule(config.optimizer, optimizer, budget.steps),
        fused=fusing.fused_step(config, models, trainable, optimizer, world.device), swaps=placed.swaps,
        ema=fusing.moving_average(config.optimizer, trainable, world.device),
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision == "fp16"),
        log=None, began=began, sample=samples.write,
        save_result=hub.uploading(uploads, lambda path, step, epoch: trainable.save(path, facts.at(step, epoch))),
        save_state=hub.uploading(uploads, lambda path: state.save(run, path), state=True), uploads=uploads,
        identity=resume.identity(config, plan, models.source), predicted=found.chosen.device if found else None,
        validation=_validation(config, data, step, caches, budget, world),
        tracker=measure.tracker(config, models, trainable, world.device),
        recover=Recovery(method, plan, data.plan, models, trainable, placed, given) if world.size == 1 else None,
    )  # fmt: skip
    state.resume(run)
    fusing.streamed(run)
    fusing.average(run)
    if (stop := config.train.stop_text_encoder_training) and run.step >= stop:
        trainable.freeze_encoders()
    build.training(optimizer)
    trainable.train(True)
    if world.main:
        run.log = log.Log(config, run.step, asdict(config))
    return run


def _say(notes: Sequence[str], plan: Plan, budget: loop.StepBudget) -> None:
    """Print what a run will do."""
    for line in (*notes, steps_line(plan, budget), budget.text()):
        console.print(line)


def _read(config: Config, models: Models, world: dist.World) -> None:
    """The nets that a step uses, in place of those that filled the caches; what is in fewer bits is told."""
    notes = quantised_notes(config, models)
    unload(models)
    read_models(config, models, map=world.device.type != "cpu")
    if world.main:
        for note in dict.fromkeys([*notes, *quantised_notes(config, models)]):
            console.print(note)


def _loader(
    config: Config,
    plan: Plan,
    models: Models,
    caches: Caches,
    budget: loop.StepBudget,
    world: dist.World,
    draw: Callable[[Tensor, Sequence[int]], Drawn],
) -> Loader:
    return Loader(
        plan=plan, seed=config.train.seed, tokenize=partial(models.tokenize, training=True), draw=draw,
        pack=_packing(world.device),
        latents=caches.latents, texts=caches.texts, prior_loss_weight=config.loss.prior_loss_weight,
        accumulation=budget.accumulation, rank=world.rank, world=world.size,
        steps=budget.steps, workers=config.train.max_data_loader_n_workers,
        persistent=config.train.persistent_data_loader_workers, notice=console.print,
        # A CPU that computes the steps has no time to spare, and threads of two teams are in each other's way.
        ahead=0 if world.device.type == "cpu" else AHEAD,
    )  # fmt: skip


def _validation(
    config: Config, data: Data, step: Step, caches: Caches, budget: loop.StepBudget, world: dist.World
) -> Validation | None:
    """What measures the loss on held-out images, if there are some."""
    plan, (models, _) = data.evaluation, step.unowned
    if plan is None or caches.evaluation is None:
        return None
    alone = replace(budget, accumulation=1)
    loader = _loader(config, plan, models, caches.evaluation, alone, world, lambda sizes, keys: {})
    loader = replace(loader, seed=noise_seed(plan), workers=0, pack=lambda batch: batch)
    return Validation(plan=plan, loader=loader, step=step, models=models, process=step.process, world=world)


def _packing(device: torch.device) -> Callable[[Batch], Batch]:
    """How batches lie in the host's memory: for a device with its own in one run of bytes, which are page-locked but on
    Apple's, where device and host share memory."""
    return (lambda batch: batch) if device.type == "cpu" else partial(Batch.pack, pinned=device.type != "mps")


def _optimizer(config: Config, trainable: Trainable, device: torch.device) -> torch.optim.Optimizer:
    # On the CPU one kernel for many weights would change the last bits, and win nothing.
    made = build.optimizer(config.optimizer, trainable.groups(), fused=device.type != "cpu")
    t = config.train
    return build.in_low_bits(made, t.seed, kahan=t.kahan_summation) if t.full_bf16 else made


def _distributed(step: Step, trainable: Trainable, world: dist.World) -> nn.Module:
    """The step, of which several processes exchange the gradients."""
    if world.size == 1:
        return step
    # A clip_skip, or a text encoder frozen on the way, leaves weights without a gradient.
    return DistributedDataParallel(step, find_unused_parameters=trainable.trained != ("denoiser",))


class Samples:
    """The sample images of a run, written while it trains."""

    def __init__(
        self, config: Config, models: Models, process: NoiseProcess, prompts: list[Prompt], device: torch.device
    ) -> None:
        """Where text outputs are cached, the prompts are encoded now, as the text encoders leave the memory then."""
        self.config, self.models, self.process, self.prompts, self.device = config, models, process, prompts, device
        self.precision = dist.precision(config.train.mixed_precision)
        self.encoded: EncodedPrompts | None = None
        if prompts and caches_text(config):
            materialize(models, device)
            with autocast(device, self.precision):
                self.encoded = encode_prompts(models, prompts, device)

    def write(self, step: int, epoch: int) -> None:
        """An image of each prompt after `step` steps, in `epoch` (counted from 0)."""
        if not self.prompts:
            return
        output, s = self.config.output, self.config.sample
        by_epoch = s.sample_every_n_epochs is not None and s.sample_every_n_steps is None
        named = {"epoch": epoch + 1} if by_epoch else {"step": step}
        if step == 0:
            named = {"epoch": 0}  # as in sd-scripts
        with autocast(self.device, self.precision), progress("sampling images") as advance:
            sample(
                self.models, self.prompts, Path(output.output_dir) / "sample", process=self.process,
                name=output.output_name, sampler=s.sample_sampler, seed=self.config.train.seed, progress=advance,
                encoded=self.encoded, device=self.device, **named,
            )  # fmt: skip


def _finish(run: loop.Run, ended: bool) -> None:
    """Save the result, plot the loss, print what it took."""
    config, step = run.config, run.step
    folder, name = Path(config.output.output_dir), config.output.output_name
    epoch = max(0, -(-step // run.budget.steps_per_epoch) - 1)
    result = folder / f"{name if ended else checkpoints.step_name(name, step)}{run.trainable.suffix()}"
    if ended:
        _save_last(run, result, epoch)
        if config.output.save_state or config.output.save_state_on_train_end:
            run.save_state(folder / checkpoints.state_name(name))
    if run.log:
        with run.mishaps.survived("the curve of the loss not plotted"):
            log.curve(run.log.path, folder / f"{name}-loss.png")
    if run.log and run.validation:
        with run.mishaps.survived("the measurements of held-out images not compared"):
            if said := monitor.verdict(monitor.points(run.log.path)):
                console.print(said.text())
    seconds = time.monotonic() - run.began
    first = run.first_step_after or seconds
    speed = (step - run.start_step - 1) / max(seconds - first, 1e-9)
    console.print(
        f"{result}: {'done' if ended else f'stopped after step {step}; go on with --resume auto'}. "
        f"First step after {first:.1f} s, {speed:.2f} steps/s, {measure.told(run)}"
    )


def _save_last(run: loop.Run, result: Path, epoch: int) -> None:
    """Save the result of the whole run: where it belongs, or else anywhere. Errors: `UserError`, saying where it is if
    it is anywhere."""
    try:
        with loop.evaluation_weights(run):
            run.save_result(result, run.step, epoch)
    except UserError as error:
        # Where the values do not fit the format that was asked for, the state is all that is left of the whole run.
        loop.save_what_is_done(run, anyway=not isinstance(error, WriteError))
        if not isinstance(error, WriteError):
            raise
        spare = Path(tempfile.mkdtemp(prefix="sfumato-"))
        try:
            with loop.evaluation_weights(run):
                run.save_result(spare / result.name, run.step, epoch)
        except UserError:
            shutil.rmtree(spare, ignore_errors=True)
            raise error from None
        raise WriteError(
            f"{error}\nThe result was saved as {spare / result.name} instead; move it away soon"
        ) from error
