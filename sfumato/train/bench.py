"""Training steps of a model with random weights, measured: seconds of each phase, memory, and the share of what the
machine can do.

Latents and captions count as cached, so it is the denoiser's step: what is drawn and copied, forward, backward,
clipping and the optimizer, put together as in `train/run.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sfumato import adapters, families
from sfumato.config import Config, Method
from sfumato.data.batch import Batch
from sfumato.data.loader import StepBatches
from sfumato.errors import UserError
from sfumato.memory.swap_plan import bytes_of
from sfumato.models.base import Models
from sfumato.models.loading import read_values
from sfumato.models.meta_init import shapes
from sfumato.optim import build
from sfumato.tensors.random import generator
from sfumato.train import dist, fusing, loop, outlines, run, swapping, trainables
from sfumato.train.devices import choose_formats, formats, peak_memory, place_models
from sfumato.train.step import Step, draw
from sfumato.train.trainables import Trainable

MATMUL = {"cpu": 1024}
"""Rows and columns of the products by which a device's speed is found; others 4096."""
COPIED = {"cpu": 1 << 26}
"""Bytes that are copied for the same; others 256 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured."""

    family: str
    method: Method
    config: Config
    """Settings, without a base model."""
    parts: outlines.Parts
    """The shapes of its tensors."""
    resolution: int
    """Side of the pictures, in pixels."""
    batch_size: int = 1
    warm: int = 2
    """Steps that are not timed."""
    rounds: int = 3
    steps: int = 4
    """Of a round, after which the device is waited for."""


def measure(case: Case) -> dict[str, Any]:
    """Its figures; JSON-able. Sizes in bytes, rates in FLOP or bytes a second. Errors: `UserError` for settings that do
    not fit the model."""
    device, began = dist.device_of(), time.monotonic()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = _Bench.of(case, Path(folder), device)
        wait(device)
        ready = time.monotonic() - began
        flops, first = bench.first()
        bench.go(case.warm)
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)  # counting operations takes memory of its own
        rounds = sorted(bench.go(case.steps) for _ in range(case.rounds))
        peak = peak_memory(device) if device.type != "cpu" else None
        return {
            **bench.sizes, "seconds_until_ready": ready, "seconds_of_first_step": first,
            "seconds_per_step": median(rounds), "seconds_of_rounds": rounds, "phases": bench.phases(),
            "flop_per_step": flops, "peak_device": peak, "peak_host": peak_memory(torch.device("cpu")),
            **bench.shares(median(rounds), flops), "loss": float(bench.loss),
        }  # fmt: skip


@dataclass(slots=True)
class _Bench:
    """A run that takes made batches."""

    run: loop.Run
    batches: Iterator[Batch]
    sizes: dict[str, Any]
    """Numbers of the denoiser and of what is trained; bytes that are streamed."""
    loss: Tensor | float = float("nan")

    @classmethod
    def of(cls, case: Case, folder: Path, device: torch.device) -> _Bench:
        config, models, trainable = _loaded(case, folder, device)
        choice = swapping.chosen(config, models).get("denoiser")
        blocks = bytes_of(models.family.blocks(models.denoiser))
        sizes = {
            "parameters": sum(p.numel() for p in models.denoiser.parameters()),
            "trained": sum(p.numel() for p in trainable.weights().values()),
            "streamed": sum(blocks[place] for place in choice.places) if choice else 0,
        }
        return cls(_assembled(config, models, trainable, device), _batches(case, models, config, device), sizes)

    def first(self) -> tuple[int | None, float]:
        """Floating-point operations of a step, which compiled blocks do not tell, and seconds that the first one
        takes."""
        start, compiled = time.monotonic(), self.run.config.memory.torch_compile
        with nullcontext() if compiled else FlopCounterMode(display=False) as counter:
            self.go(1)
        return counter and counter.get_total_flops(), time.monotonic() - start

    def go(self, count: int) -> float:
        """Seconds of a step, of several that are waited for at their end."""
        device = self.run.world.device
        given = [next(self.batches) for _ in range(count)]
        wait(device)
        start = time.monotonic()
        for batch in given:
            self._step(batch)
        wait(device)
        return (time.monotonic() - start) / max(count, 1)

    def _step(self, batch: Batch) -> None:
        self.loss = loop._optimizer_step(self.run, StepBatches(iter([batch]), 1, len(batch)))["loss"]

    def phases(self) -> dict[str, float]:
        """Seconds of the parts of a step that waits for the device after each: drawing and copying the batch, forward,
        backward, and clipping and the optimizer (where that steps while gradients come, it counts as backward)."""
        device, spent, ends = self.run.world.device, dict.fromkeys(("data", "forward"), 0.0), list[float]()
        step, scaler, start = self.run.training_step, self.run.scaler, _now(device)
        batch = next(self.batches).to(device)
        spent["data"], begun = _now(device) - start, _now(device)

        def timed(given: Batch) -> Tensor:
            began = _now(device)
            cost: Tensor = step(given)
            spent["forward"] += _now(device) - began
            return cost

        def unscale(optimizer: torch.optim.Optimizer) -> None:
            ends.append(_now(device))
            type(scaler).unscale_(scaler, optimizer)

        self.run.training_step = timed  # type: ignore[assignment]
        scaler.unscale_ = unscale  # type: ignore[method-assign]
        try:
            self._step(batch)
        finally:
            self.run.training_step = step
            del scaler.unscale_
        end = _now(device)
        optimizer = end - ends[0] if ends else 0.0
        return {**spent, "backward": end - begun - spent["forward"] - optimizer, "optimizer": optimizer}

    def shares(self, seconds: float, flops: int | None) -> dict[str, Any]:
        """What this device does at most, and how much of that a step did."""
        device = self.run.world.device
        dtype = dist.DTYPES[dist.precision(self.run.config.train.mixed_precision)]
        matmul, copies = matmul_rate(device, dtype), copy_rate(device)
        # A streamed block comes once for each direction of the pass.
        copied = 2 * self.sizes["streamed"]
        return {
            "matmul_rate": matmul, "share_of_matmul": flops and flops / seconds / matmul,
            "copy_rate": copies, "share_of_copy": copied / seconds / copies,
        }  # fmt: skip


def _loaded(case: Case, folder: Path, device: torch.device) -> tuple[Config, Models, Trainable]:
    """A model whose denoiser has random values, in the formats that the settings ask for, and what is trained of it."""
    models = outlines.outline_of(families.family(case.family), case.config.family, case.parts, folder)
    config = replace(
        case.config, model=replace(case.config.model, pretrained_model_name_or_path=str(models.source.path))
    )
    choose_formats(config, models, case.method)
    outlines.randomise(models)
    later = [name for name in models.source.components if name != "denoiser"]
    dtype = formats(config, models.family, case.method)
    read_values(models, dtype=dtype, later=later, map=device.type != "cpu")
    plan = None
    if case.method == "network":
        plan = adapters.parse(config.network, families.facts(case.family).network_args)
    trainable = trainables.make(case.method, models, config, plan)
    if models.encodes():
        raise UserError("what this ControlNet follows passes through the VAE, which is not measured here")
    return config, models, trainable


def _assembled(config: Config, models: Models, trainable: Trainable, device: torch.device) -> loop.Run:
    """A run as `run.prepare` puts it together, without images and results."""
    world, precision = dist.World(0, 1, device), dist.precision(config.train.mixed_precision)
    placed = place_models(config, models, trainable, device)
    optimizer = run._optimizer(config, trainable, device)
    nothing: Any = None
    made = loop.Run(
        config=config, world=world, budget=loop.StepBudget(1, 1, 1, 1, 1), plan=nothing, loader=nothing,
        trainable=trainable, training_step=Step(
            models, trainable, models.process(config.noise, config.loss), config.loss, precision
        ),
        optimizer=optimizer, schedule=nothing, ema=None,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"), log=None, sample=nothing,
        save_result=nothing, save_state=nothing,
        fused=fusing.fused_step(config, models, trainable, optimizer, device), swaps=placed.swaps,
    )  # fmt: skip
    fusing.streamed(made)
    build.training(optimizer)
    trainable.train(True)
    return made


def _batches(case: Case, models: Models, config: Config, device: torch.device) -> Iterator[Batch]:
    """Batches of random latents and captions, as they come from the loader."""
    facts, count, g = models.family.latents, case.batch_size, generator(0, "bench")
    side, pixels = case.resolution // facts.stride, case.resolution
    latents = torch.randn(count, facts.channels, side, side, generator=g)
    cond = dict(_captions(models.family.caption(shapes(models.denoiser.state_dict())), count, g))
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * count)
    followed = torch.rand(count, 3, pixels, pixels, generator=g) if models.followers else None
    process, pack, step = models.process(config.noise, config.loss), run._packing(device), 0
    while True:
        keys = [step * count + i for i in range(count)]
        batch = Batch(
            captions=[""] * count, keys=keys, weight=torch.ones(count), multiplier=torch.ones(count), sizes=sizes,
            latents=latents, cond=cond, control=followed, drawn=draw(models, process, sizes, keys),
        )  # fmt: skip
        yield pack(batch)
        step += 1


def _captions(fields: Mapping[str, Sequence[int]], count: int, g: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, shape in fields.items():
        if name.endswith("_ids"):
            yield name, torch.randint(1, 64, (count, *shape), generator=g)
        else:
            yield name, torch.randn(count, *shape, generator=g).bfloat16()


# --- the machine ---


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _now(device: torch.device) -> float:
    wait(device)
    return time.monotonic()


def _best(job: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    """The fewest seconds of several tries, of which the first is not timed."""
    job()
    found = []
    for _ in range(tries):
        start = _now(device)
        job()
        found.append(_now(device) - start)
    return min(found)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large product."""
    n = MATMUL.get(device.type, 4096)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    with torch.autocast(device.type, enabled=False) if device.type != "mps" else nullcontext():
        return 2 * n**3 / _best(lambda: a @ b, device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy from the host's page-locked memory; on the CPU, within its memory."""
    size = COPIED.get(device.type, 1 << 28)
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / _best(lambda: target.copy_(source, non_blocking=True), device)
