"""Batches, epoch by epoch; the same whatever the number of workers and processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sfumato.config import SubsetConfig
from sfumato.data import augment, captions
from sfumato.data.batch import Batch, Cond, Tokens
from sfumato.data.buckets import Crop
from sfumato.data.cache import Report
from sfumato.data.plan import Item, Plan
from sfumato.data.strategies import TextEncoderOutputsCachingStrategy
from sfumato.errors import UserError
from sfumato.tensors.random import python_random


@dataclass(frozen=True, slots=True)
class _Draw:
    """One sample to be read."""

    item: int
    key: int


@dataclass(frozen=True, slots=True)
class _Job:
    """One batch to be read."""

    draws: tuple[_Draw, ...]
    epoch: int
    step: int
    spare: bool = False
    """Whether the batch only keeps this process busy while others have one left; it weighs nothing."""


Read = dict[str, list[Tensor]]


@dataclass(slots=True)
class _Pictures(Dataset["Read | UserError"]):
    """Reads pictures or their latents: the part of the work that may run in other processes."""

    plan: Plan
    latents: Report | None

    def __getitem__(self, job: _Job) -> Read | UserError:
        try:
            samples = [self._sample(draw) for draw in job.draws]
        except UserError as error:
            return error  # raised again by the loader; torch would wrap it in a worker's traceback
        names = {name for sample in samples for name in sample}
        return {name: [self._or_ones(sample, name) for sample in samples] for name in sorted(names)}

    def _sample(self, draw: _Draw) -> dict[str, Tensor]:
        item = self.plan.items[draw.item]
        options = self.plan.subset(item)
        crop, flip = _fate(item, options, draw.key)
        sizes = {"sizes": torch.tensor(_sizes(item, crop, flip))}
        if self.latents is not None:
            return sizes | _stored(self.latents, draw.item, item, flip)
        colours = python_random(draw.key, "colours") if options.color_aug else None
        return sizes | augment.load(item.picture, options, item.placement, crop, stride=self.plan.stride, flip=flip, colours=colours)

    def _or_ones(self, sample: Mapping[str, Tensor], name: str) -> Tensor:
        """A picture without a mask among others that have one counts everywhere."""
        if name in sample or name != "mask":
            return sample[name]
        height, width = sample["sizes"][4:].tolist()
        return torch.ones(1, height // self.plan.stride, width // self.plan.stride)


def _fate(item: Item, options: SubsetConfig, key: int) -> tuple[Crop, bool]:
    """Where a draw is cut out, and whether it is mirrored."""
    crop = augment.random_crop(item.placement, python_random(key, "crop")) if options.random_crop else item.placement.centre
    return crop, options.flip_aug and python_random(key, "flip").random() < 0.5


def _sizes(item: Item, crop: Crop, flip: bool) -> list[int]:
    """Original height and width, crop top and left as seen in the mirrored picture, target height and width."""
    left, top = item.placement.mirrored(crop) if flip else crop
    return [item.picture.height, item.picture.width, top, left, item.placement.bucket[1], item.placement.bucket[0]]


def _stored(latents: Report, place: int, item: Item, flip: bool) -> dict[str, Tensor]:
    entry = latents.store.get(latents.keys[place])
    if entry is None:
        raise UserError(f"the cached latents of {item.picture.path} are gone or damaged: start again, and they are made anew")
    found = {"latents": entry["latents_flipped" if flip else "latents"].float()}
    if "mask" in entry:
        found["mask"] = entry["mask"].flip(2) if flip else entry["mask"]
    return found


class _Jobs(Sampler[_Job]):
    """Hands the jobs of the current epoch to the readers, which live on."""

    def __init__(self) -> None:
        self.jobs: Sequence[_Job] = ()

    def __iter__(self) -> Iterator[_Job]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)


@dataclass(slots=True, kw_only=True)
class Loader:
    """Makes the batches of a plan.

    Every draw follows from (seed, epoch, picture, repeat) alone; see `Item.key`. Pictures are read by `workers` other
    processes (none when latents are in memory: then there is nothing to read).
    """

    plan: Plan
    seed: int
    tokenize: Callable[[Sequence[str]], Tokens] | None = None
    """Captions -> tokens; called in this process. Not needed with `texts`."""
    latents: Report | None = None
    """Of `cache_latents`; None: batches carry pixels."""
    texts: Report | None = None
    """Of `cache_texts`; None: batches carry tokens."""
    outputs: TextEncoderOutputsCachingStrategy = field(default_factory=lambda: TextEncoderOutputsCachingStrategy(fields=()))
    """How text outputs are kept."""
    prior_loss_weight: float = 1.0
    accumulation: int = 1
    """Batches a process takes for one optimizer step."""
    steps: int = 0
    """Optimizer steps of the run: what a `token_warmup_step` below 1 is a share of."""
    workers: int = 0
    persistent: bool = False
    """Keep the workers between epochs."""
    _queue: _Jobs = field(init=False, default_factory=_Jobs)
    _reader: DataLoader[Read | UserError] = field(init=False)
    _subsets: list[list[SubsetConfig]] = field(init=False)

    def __post_init__(self) -> None:
        in_memory = self.latents is not None and self.latents.store.root is None
        workers = 0 if in_memory else self.workers
        self._reader = DataLoader(
            _Pictures(self.plan, self.latents),
            batch_size=None,
            sampler=self._queue,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts,
            persistent_workers=self.persistent and workers > 0,
            generator=torch.Generator(),  # else torch would draw from the global one
        )
        self._subsets = [[self._whole_warmup(subset) for subset in dataset.subsets] for dataset in self.plan.datasets]

    def _whole_warmup(self, subset: SubsetConfig) -> SubsetConfig:
        if 0 < subset.token_warmup_step < 1 and not self.steps:
            raise UserError(
                f"{subset.image_dir}: token_warmup_step {subset.token_warmup_step} is a share of the run: its steps must be known"
            )
        return replace(subset, token_warmup_step=captions.with_whole_warmup(subset, self.steps))

    def batches_per_epoch(self, world: int = 1) -> int:
        """Batches that each of `world` processes takes in an epoch."""
        return -(-self.plan.batches_per_epoch // world)

    def epoch(self, epoch: int, start_batch: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of process `rank` of `world` in an epoch (counted from 0), from its `start_batch`-th on.

        Processes take batches in turn. Where the last turn does not go round, the rest get a batch again with weight 0:
        all processes do the same number of steps, and the samples together are those of one process.
        """
        self._queue.jobs = jobs = self._jobs(epoch, rank, world)[start_batch:]
        for job, read in zip(jobs, self._reader, strict=True):
            if isinstance(read, UserError):
                raise read
            yield self._batch(job, read)

    def _jobs(self, epoch: int, rank: int, world: int) -> list[_Job]:
        batches = self.plan.batches(epoch, self.seed)
        first = epoch * self.plan.steps_per_epoch(self.accumulation, world)
        jobs = []
        for turn in range(self.batches_per_epoch(world)):
            number = turn * world + rank
            refs = batches[number % len(batches)]
            draws = tuple(_Draw(r.item, self.plan.items[r.item].key(self.seed, epoch, r.repeat)) for r in refs)
            jobs.append(_Job(draws, epoch, first + turn // self.accumulation, spare=number >= len(batches)))
        return jobs

    def _batch(self, job: _Job, read: Read) -> Batch:
        items = [self.plan.items[draw.item] for draw in job.draws]
        said = [self._caption(item, draw.key, job) for item, draw in zip(items, job.draws, strict=True)]
        weights = [0.0 if job.spare else self.prior_loss_weight if item.picture.is_reg else 1.0 for item in items]
        stacked = {name: torch.stack(values) for name, values in read.items()}
        return Batch(
            captions=said,
            keys=[draw.key for draw in job.draws],
            weight=torch.tensor(weights),
            multiplier=torch.tensor([self.plan.datasets[item.dataset].network_multiplier for item in items]),
            sizes=stacked["sizes"],
            latents=stacked.get("latents"),
            pixels=stacked.get("pixels"),
            mask=stacked.get("mask"),
            cond=_cond(self.texts, self.outputs, said) if self.texts else None,
            tokens=self.tokenize(said) if self.tokenize and not self.texts else None,
        )

    def _caption(self, item: Item, key: int, job: _Job) -> str:
        options = self._subsets[item.dataset][item.picture.subset]
        return captions.vary(item.picture.captions, options, python_random(key, "caption"), epoch=job.epoch + 1, step=job.step)


def _cond(texts: Report, outputs: TextEncoderOutputsCachingStrategy, said: Sequence[str]) -> Cond:
    entries = [texts.store.get(texts.keys[caption]) for caption in said]
    whole = [entry for entry in entries if entry is not None]
    if len(whole) < len(entries):
        raise UserError(f"cached text outputs of {said[entries.index(None)]!r} are gone or damaged: start again, and they are made anew")
    return outputs.join(whole)


def _as_it_is(read: Any) -> Any:
    return read


def _leave_interrupts(_: int) -> None:
    """Ctrl+C reaches all processes of a terminal; the main one decides what it means, and needs its workers until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
