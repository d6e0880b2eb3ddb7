"""A run from its config to its result: everything is put together here, once, in one order."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfumato import adapters, families
from sfumato.adapters import AdapterPlan
from sfumato.adapters.insert import from_state
from sfumato.config import Config, DatasetConfig
from sfumato.data.batch import Cond, Tokens
from sfumato.data.cache import Report, cache_latents, cache_texts
from sfumato.data.loader import Loader
from sfumato.data.plan import Plan, make_plan
from sfumato.data.store import Index, Store, default_root
from sfumato.families.base import Models, check_sizes
from sfumato.families.loading import examine, fetch, forget, load
from sfumato.formats import files
from sfumato.formats.files import file_digest
from sfumato.formats.metadata import remembered
from sfumato.memory.plan import fit
from sfumato.optim import build, schedules
from sfumato.optim.ema import EMA
from sfumato.tensors import attention
from sfumato.tensors.noise import Process
from sfumato.train import dist, keep, log, loop, provenance, state
from sfumato.train.progress import Tell, console, telling
from sfumato.train.prompts import Prompt, default, read_prompts, sampler
from sfumato.train.sample import Known, check_prompts, encode_prompts, sample
from sfumato.train.step import Step, autocast
from sfumato.train.trainables import Adapters, Full, Trainable, caches_latents, caches_text, read_adapter, whole_nets

Method = Literal["network", "full"]


@dataclass(frozen=True, slots=True)
class Data:
    """The pictures of a run and where what is made of them is kept."""

    plan: Plan
    latents: Store
    texts: Store
    index: Index


def open_data(config: Config, datasets: tuple[DatasetConfig, ...], world: dist.World) -> Data:
    """Scan the datasets; memory alone is used unless a cache on disk is asked for."""
    d = config.data
    on_disk = d.cache_latents_to_disk or d.cache_text_encoder_outputs_to_disk or d.cache_dir
    root = (Path(d.cache_dir) if d.cache_dir else default_root()) if on_disk else None
    index, latents = Index(root), families.of(config.family).latents
    with telling("reading pictures", quiet=not world.main) as tell:
        plan = make_plan(
            datasets, index, skip_unreadable=d.skip_unreadable, stride=latents.stride, multiple=latents.multiple, progress=tell
        )
    if world.main:
        for line in [*plan.notes, *(f"left out: {skip.path}: {skip.reason}" for skip in plan.skipped)]:
            console.print(line)
    return Data(
        plan, Store(root if d.cache_latents_to_disk else None), Store(root if d.cache_text_encoder_outputs_to_disk else None), index
    )


def load_models(config: Config, precision: dist.Precision, method: Method | None) -> Models:
    """The base model, each net read straight into the format that it is used in: frozen ones in that of the computation, trained ones
    as they are trained, the VAE in fp32 where that is safer. `method`: None when nothing is trained."""
    family = families.of(config.family)
    trained = whole_nets(family, config, [part.name for part in family.parts]) if method == "full" else ()
    dtype = dict.fromkeys([part.name for part in family.parts], dist.DTYPES[precision])
    dtype |= dict.fromkeys(trained, torch.bfloat16 if config.train.full_bf16 else torch.float32)
    model = config.model
    later = [part.name for part in family.parts if part.name not in ("denoiser", "vae")] if forgets_text(config) else ()
    with telling("reading weights") as tell:
        models = load(
            family,
            model.pretrained_model_name_or_path,
            config.family,
            vae=model.vae,
            tokenizer=model.tokenizer,
            dtype=dtype,
            later=later,
            progress=tell,
        )
    if models.vae is not None:
        # fp16 overflows in these VAEs, so it is never what they run in.
        # By nn.Module's own `to`: diffusers' logs a warning about nothing.
        nn.Module.to(models.vae, torch.bfloat16 if precision == "bf16" and not config.memory.no_half_vae else torch.float32)
    return models


@dataclass(frozen=True, slots=True)
class Caches:
    """What is kept of pictures and captions; None where they are encoded in each step."""

    latents: Report | None = None
    texts: Report | None = None


def fingerprint(config: Config, models: Models, component: str) -> str:
    """Changes when what a net says does: with its file, with what is merged into it and with the format that it runs in.

    Files are read for it once; later runs remember.
    """
    source, net = models.source, models.vae if component == "vae" else models.encoders[component]
    assert source is not None and net is not None
    held = source.held[component]
    paths = held.tensors.paths
    dtype = models.dtypes[component] if component != "vae" else next(net.parameters()).dtype
    digest = remembered(f"{component} of {' '.join(map(str, paths))}", paths, lambda: files.fingerprint(dict(held.natives())))
    network = config.network
    merged = [file_digest(path) for path in network.base_weights] if component != "vae" else []
    return " ".join([digest, *merged, *(map(str, network.base_weights_multiplier) if merged else ()), f"in {dtype}"])


def fill_caches(config: Config, data: Data, models: Models, world: dist.World) -> Caches:
    """Encode what is asked to be kept and is not there yet; the first process fills a disk, each its own memory.

    The VAE and the text encoders take turns on the device, where the denoiser is not yet.
    """
    check_sizes(models, data.plan.largest())
    latents = texts = None
    if caches_latents(config):
        models.the_vae().to(world.device)
        with telling("encoding pictures", quiet=not world.main) as tell:
            latents = _in_turn(world, partial(_cache_latents, config, data, models, world, tell))
        models.the_vae().to("cpu")
    if caches_text(config):
        with telling("encoding captions", quiet=not world.main) as tell:
            texts = _in_turn(world, partial(_cache_texts, config, data, models, world, tell))
    for name, report in (("latents", latents), ("text outputs", texts)):
        if report and world.main:
            console.print(f"{name}: {report}")
    return Caches(latents, texts)


def _in_turn(world: dist.World, job: Callable[[], Report]) -> Report:
    """The first process does the job before the others, which then find on the disk what it made."""
    if not world.main:
        world.wait()
    report = job()
    if world.main:
        world.wait()
    return report


def _cache_latents(config: Config, data: Data, models: Models, world: dist.World, tell: Tell) -> Report:
    vae, strategy = models.the_vae(), models.family.latents
    dtype = next(vae.parameters()).dtype

    def encode(pixels: Tensor) -> Tensor:
        return strategy.encode(vae, pixels.to(world.device, dtype)).float()

    return cache_latents(
        data.plan, data.latents, data.index, encode, fingerprint(config, models, "vae"), strategy,
        batch_size=config.memory.vae_batch_size, progress=tell,
    )  # fmt: skip


def _cache_texts(config: Config, data: Data, models: Models, world: dist.World, tell: Tell) -> Report:
    tokenize, encode = models.family.tokenize(models), models.family.encode(models)

    def run(tokens: Tokens) -> Cond:
        fetch(models, world.device)
        with autocast(world.device, dist.precision(config.train.mixed_precision)):  # as in the step
            return encode.encode(models.encoders, {k: v.to(world.device) for k, v in tokens.items()})

    prints = ", ".join(f"{name} {fingerprint(config, models, name)}" for name in models.encoders)
    return cache_texts(
        data.plan, data.texts, data.index, tokenize.tokenize, run, prints, models.family.outputs(models),
        settings={**tokenize.settings, **encode.settings}, progress=tell,
    )  # fmt: skip


def cache(config: Config, datasets: tuple[DatasetConfig, ...]) -> Caches:
    """`sfumato cache`: fill the caches on disk and stop."""
    world = dist.world()
    try:
        _examine(config)
        data = open_data(config, datasets, world)
        models = load_models(config, dist.precision(config.train.mixed_precision), None)
        return fill_caches(config, data, models, world)
    finally:
        world.close()


def train(config: Config, method: Method, datasets: tuple[DatasetConfig, ...], resolved: str = "") -> None:
    """Train and save. `resolved` is the whole config as TOML; it is written beside the result before the first step.

    Errors: `UserError` for whatever the user can mend.
    """
    began = time.monotonic()
    world = dist.world()
    try:
        course = prepare(config, method, datasets, world, began)
        with course.log or nullcontext():
            if world.main:
                files.write_text(Path(config.output.output_dir) / f"{config.output.output_name}.toml", resolved)
            ended = loop.run(course)
        if world.main:
            _finish(course, ended)
        world.wait()
    finally:
        world.close()


def check(config: Config, method: Method) -> tuple[list[Prompt], AdapterPlan | None]:
    """What can be told before a picture or a weight is read: the prompts, and the plan of adapters. Errors: `UserError`."""
    prompts = read_prompts(config.sample.sample_prompts, default(config.family)) if config.sample.sample_prompts else []
    sampler(config.sample.sample_sampler)
    plan = adapters.parse(config.network, families.facts_of(config.family).network_args) if method == "network" else None
    _examine(config)
    return prompts, plan


def _examine(config: Config) -> None:
    """The model's files by their headers. Errors: `UserError` for what is missing, or of another family."""
    examine(families.of(config.family), config.model.pretrained_model_name_or_path, config.family, vae=config.model.vae)


def prepare(config: Config, method: Method, datasets: tuple[DatasetConfig, ...], world: dist.World, began: float) -> loop.Course:
    """Everything up to the first step, in this order: what headers tell, pictures, model, caches, trainable, memory, optimizer, state."""
    precision = dist.precision(config.train.mixed_precision)
    attention.choose("xformers" if config.memory.xformers else "sdpa")
    prompts, plan = check(config, method)
    data = open_data(config, datasets, world)
    pace = loop.Pace.of(config, data.plan.batches_per_epoch, world.size)
    if world.main:
        console.print(data.plan.steps_line(config.train.gradient_accumulation_steps, world.size))
        console.print(f"{pace.steps} steps in {pace.epochs} epochs")
    models = load_models(config, precision, method)
    check_prompts(models, prompts, config.sample.sample_sampler)
    process = models.family.process(models, config.noise, config.loss)
    merge_base_weights(config, models)
    caches = fill_caches(config, data, models, world)
    trainable: Trainable = Adapters(models, config, plan) if plan else Full(models, config)
    known = known_prompts(config, models, prompts, world, precision)
    place(config, models, trainable, world)
    optimizer = build.optimizer(config.optimizer, trainable.groups())
    if config.train.full_bf16:
        optimizer = build.in_low_bits(optimizer, config.train.seed)
    step = _shared(Step(models, trainable, process, config.loss, precision), trainable, world)
    loader = Loader(
        plan=data.plan,
        seed=config.train.seed,
        tokenize=models.family.tokenize(models).tokenize,
        latents=caches.latents,
        texts=caches.texts,
        outputs=models.family.outputs(models),
        prior_loss_weight=config.loss.prior_loss_weight,
        accumulation=config.train.gradient_accumulation_steps,
        steps=pace.steps,
        workers=config.train.max_data_loader_n_workers,
        persistent=config.train.persistent_data_loader_workers,
    )
    tell = partial(_draw, config, models, process, prompts, known, world, precision)
    facts = provenance.Facts(config=config, models=models, plan=data.plan, pace=pace, adapter=plan)
    course = loop.Course(
        config=config, world=world, pace=pace, plan=data.plan, loader=loader, trainable=trainable, step=step, optimizer=optimizer,
        schedule=schedules.schedule(config.optimizer, optimizer, pace.steps),
        ema=EMA(trainable.weights(), config.optimizer.ema_decay) if config.optimizer.ema_decay else None,
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision == "fp16"),
        log=None, draw=tell, began=began,
        save_result=lambda path, done, epoch: trainable.save(path, facts.at(done, epoch)),
        save_state=lambda path: state.save(course, path),
    )  # fmt: skip
    state.resume(course)
    stop = config.train.stop_text_encoder_training
    if stop and course.done >= stop:
        trainable.freeze_encoders()
    build.training(optimizer)
    trainable.train(True)
    if world.main:
        Path(config.output.output_dir).mkdir(parents=True, exist_ok=True)
        course.log = log.Log(config, course.done, asdict(dataclasses.replace(config, family=None)))
    return course


def _shared(step: Step, trainable: Trainable, world: dist.World) -> nn.Module:
    """The step, of which several processes exchange the gradients."""
    if world.size == 1:
        return step
    # A clip_skip, or a text encoder frozen on the way, leaves weights without a gradient.
    return DistributedDataParallel(step, find_unused_parameters=trainable.trained != ("denoiser",))


def merge_base_weights(config: Config, models: Models) -> None:
    """Merge `base_weights` into the nets, each at its strength."""
    strengths = config.network.base_weights_multiplier
    for i, path in enumerate(config.network.base_weights):
        inserted = from_state(models.nets(), read_adapter(models, Path(path)))
        inserted.multiplier = strengths[i] if i < len(strengths) else 1.0
        inserted.merge()
        inserted.remove()


def known_prompts(config: Config, models: Models, prompts: list[Prompt], world: dist.World, precision: dist.Precision) -> Known | None:
    """What the text encoders say of the prompts, where their outputs are kept, so that they are not needed again."""
    if not prompts or not caches_text(config):
        return None
    fetch(models, world.device)
    with autocast(world.device, precision):
        return encode_prompts(models, prompts)


def forgets_text(config: Config) -> bool:
    """Whether text encoders are read only if something is missing in the cache, and leave the memory after that."""
    # What is merged into them is in no file.
    return caches_text(config) and not config.network.base_weights


def place(config: Config, models: Models, trainable: Trainable, world: dist.World) -> None:
    """Nets to the device they are used on, those that leave it first; checkpointing around what gradients pass through."""
    family = models.family
    if forgets_text(config):
        forget(models)
    else:
        for net in models.encoders.values():
            net.to("cpu" if caches_text(config) else world.device)
    if models.vae is not None:
        models.vae.to("cpu" if caches_latents(config) else world.device)
    models.denoiser.to(world.device)
    trainable.modules().to(world.device)
    fit(family.blocks(models.denoiser), config.memory)
    for name, net in models.encoders.items():
        if name in trainable.trained:
            fit(family.encoder_blocks(net), config.memory)


def all_nets(models: Models) -> list[nn.Module]:
    """Denoiser, encoders and VAE."""
    return [*models.nets().values(), *([models.vae] if models.vae is not None else [])]


def _draw(
    config: Config,
    models: Models,
    process: Process,
    prompts: list[Prompt],
    known: Known | None,
    world: dist.World,
    precision: dist.Precision,
    step: int,
    epoch: int,
) -> None:
    if not prompts:
        return
    ended = config.sample.sample_every_n_epochs is not None and config.sample.sample_every_n_steps is None
    with autocast(world.device, precision), telling("drawing samples") as tell:
        sample(
            models, prompts, Path(config.output.output_dir) / "sample", process=process, name=config.output.output_name,
            sampler=config.sample.sample_sampler, epoch=epoch + 1 if ended else None, step=None if ended else step,
            seed=config.train.seed, progress=tell, known=known, device=world.device,
        )  # fmt: skip


def _finish(course: loop.Course, ended: bool) -> None:
    """Save the result, draw the loss, say what it took."""
    config, done = course.config, course.done
    folder, name = Path(config.output.output_dir), config.output.output_name
    epoch = max(0, -(-done // course.pace.steps_per_epoch) - 1)
    result = folder / f"{name if ended else keep.step_name(name, done)}{course.trainable.suffix()}"
    if ended:
        with loop.finished(course):
            course.save_result(result, done, epoch)
        if config.output.save_state or config.output.save_state_on_train_end:
            course.save_state(folder / keep.state_name(name))
    if course.log:
        log.curve(course.log.path, folder / f"{name}-loss.png")
    seconds = time.monotonic() - course.began
    first = course.first_step_after or seconds
    speed = (done - course.started - 1) / max(seconds - first, 1e-9)
    console.print(
        f"{result}: {'done' if ended else f'stopped after step {done}; go on with --resume auto'}. "
        f"First step after {first:.1f} s, {speed:.2f} steps/s, peak memory {peak_memory(course.world.device) / 2**20:.0f} MiB"
    )


def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator where there is one, else of this process."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
