"""Batches, epoch by epoch; the same whatever the number of workers and processes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sfumato.config import SubsetConfig
from sfumato.data import augment, captions
from sfumato.data.batch import Batch, Cond, Tokens
from sfumato.data.buckets import Crop
from sfumato.data.cache import Report, latents_mismatch, latents_shape
from sfumato.data.entries import Damaged
from sfumato.data.plan import Item, Plan
from sfumato.data.strategies import LatentsCachingStrategy, TextEncoderOutputsCachingStrategy
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


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read of one batch."""

    tensors: dict[str, list[Tensor]]
    lost: dict[int, str]
    """Place in the batch -> why there is nothing to train on: zeros stand there."""


_GONE = 16
"""So many images that cannot be read, one after another, mean that it is not the images' fault."""


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(slots=True)
class _ImageReader(Dataset[_Read]):
    """Reads images or their latents: the part of the work that may run in other processes."""

    plan: Plan
    latents: Report | None

    def __getitem__(self, job: _Job) -> _Read:
        samples, lost = [], {}
        for place, draw in enumerate(job.draws):
            try:
                samples.append(self._sample(draw))
            except UserError as error:
                lost[place] = str(error)
                samples.append(self._zeros(draw))
        names = {name for sample in samples for name in sample}
        return _Read({name: [self._or_ones(sample, name) for sample in samples] for name in sorted(names)}, lost)

    def _sample(self, draw: _Draw) -> dict[str, Tensor]:
        item = self.plan.items[draw.item]
        options = self.plan.subset(item)
        crop, flip = _crop_and_flip(item, options, draw.key)
        sizes = {"sizes": torch.tensor(_sizes(item, crop, flip))}
        if self.latents is not None:
            return sizes | _stored(self.latents, self.plan, draw.item, flip)
        colours = python_random(draw.key, "colours") if options.color_aug else None
        return sizes | augment.load(
            item.image, options, item.placement, crop, stride=self.plan.stride, flip=flip, colours=colours
        )

    def _zeros(self, draw: _Draw) -> dict[str, Tensor]:
        """In place of a sample that cannot be read, so that its batch keeps its shape."""
        item = self.plan.items[draw.item]
        sizes = {"sizes": torch.tensor(_sizes(item, item.placement.centre, False))}
        if self.latents is not None:
            return sizes | {"latents": torch.zeros(latents_shape(self.plan, item, _strategy(self.latents)))}
        width, height = item.placement.bucket
        return sizes | {"pixels": torch.zeros(3, height, width)}

    def _or_ones(self, sample: Mapping[str, Tensor], name: str) -> Tensor:
        """An image without a mask among others that have one counts everywhere."""
        if name in sample or name != "mask":
            return sample[name]
        height, width = sample["sizes"][4:].tolist()
        return torch.ones(1, height // self.plan.stride, width // self.plan.stride)


def _crop_and_flip(item: Item, options: SubsetConfig, key: int) -> tuple[Crop, bool]:
    """Where a draw is cut out, and whether it is mirrored."""
    crop = (
        augment.random_crop(item.placement, python_random(key, "crop"))
        if options.random_crop
        else item.placement.centre
    )
    return crop, options.flip_aug and python_random(key, "flip").random() < 0.5


def _sizes(item: Item, crop: Crop, flip: bool) -> list[int]:
    """Original height and width, crop top and left as seen in the mirrored image, target height and width."""
    left, top = item.placement.mirrored(crop) if flip else crop
    return [item.image.height, item.image.width, top, left, item.placement.bucket[1], item.placement.bucket[0]]


def _stored(latents: Report, plan: Plan, place: int, flip: bool) -> dict[str, Tensor]:
    item = plan.items[place]
    what = f"the cached latents of {item.image.path}"
    entry = _entry(latents, place, what)
    if wrong := latents_mismatch(entry, plan, item, _strategy(latents)):
        raise UserError(f"{what} cannot be used ({wrong}), and are made anew at the next start")
    found = {"latents": entry["latents_flipped" if flip else "latents"].float()}
    if "mask" in entry:
        found["mask"] = entry["mask"].flip(2) if flip else entry["mask"]
    return found


def _strategy(latents: Report) -> LatentsCachingStrategy:
    assert latents.strategy is not None  # `cache_latents` gives it
    return latents.strategy


def _entry(kept: Report, name: Hashable, what: str) -> dict[str, Tensor]:
    """An entry of a cache. Raises UserError when it is not there any more, or is not what was kept."""
    try:
        entry = kept.store.get(kept.keys[name])
    except Damaged as error:
        raise UserError(f"{what} cannot be used ({error}), and are made anew at the next start") from error
    if entry is None:
        raise UserError(f"{what} are gone, and are made anew at the next start")
    return entry


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

    Every draw follows from (seed, epoch, image, repeat) alone; see `Item.key`. Images are read by `workers` other
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
    outputs: TextEncoderOutputsCachingStrategy = field(
        default_factory=lambda: TextEncoderOutputsCachingStrategy(fields=())
    )
    """How text outputs are kept."""
    prior_loss_weight: float = 1.0
    accumulation: int = 1
    """Batches a process takes for one optimizer step."""
    steps: int = 0
    """Optimizer steps of the run: what a `token_warmup_step` below 1 is a share of."""
    workers: int = 0
    persistent: bool = False
    """Keep the workers between epochs."""
    notice: Callable[[str], object] = _say
    """Told, once an image, which ones cannot be read any more."""
    _lost: set[int] = field(init=False, default_factory=set)
    _row: set[int] = field(init=False, default_factory=set)
    """Images that could not be read, since one could."""
    _queue: _Jobs = field(init=False, default_factory=_Jobs)
    _reader: DataLoader[_Read] = field(init=False)
    _subsets: list[list[SubsetConfig]] = field(init=False)

    def __post_init__(self) -> None:
        in_memory = self.latents is not None and self.latents.store.root is None
        workers = 0 if in_memory else self.workers
        self._reader = DataLoader(
            _ImageReader(self.plan, self.latents),
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
                f"{subset.image_dir}: token_warmup_step {subset.token_warmup_step} is a share of the run: its steps "
                "must be known"
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
            self._account(job, read)
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

    def _account(self, job: _Job, read: _Read) -> None:
        """Tell what was lost. Raises UserError when nothing can be read any more."""
        for place, draw in enumerate(job.draws):
            if place not in read.lost:
                self._row.clear()
                continue
            if draw.item not in self._lost:
                self._lost.add(draw.item)
                self.notice(f"{read.lost[place]}; training goes on without it")
            self._row.add(draw.item)
            if len(self._row) >= min(_GONE, len(self.plan.items)):
                raise UserError(
                    f"{read.lost[place]}; nor could the {len(self._row) - 1} images before it be read: are their "
                    "folders still there?"
                )

    def _batch(self, job: _Job, read: _Read) -> Batch:
        items = [self.plan.items[draw.item] for draw in job.draws]
        said = [self._caption(item, draw.key, job) for item, draw in zip(items, job.draws, strict=True)]
        weights = [self.prior_loss_weight if item.image.is_reg else 1.0 for item in items]
        weights = [0.0 if job.spare or place in read.lost else weight for place, weight in enumerate(weights)]
        stacked = {name: torch.stack(values) for name, values in read.tensors.items()}
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
        options = self._subsets[item.dataset][item.image.subset]
        return captions.vary(
            item.image.captions, options, python_random(key, "caption"), epoch=job.epoch + 1, step=job.step
        )


def _cond(texts: Report, outputs: TextEncoderOutputsCachingStrategy, said: Sequence[str]) -> Cond:
    return outputs.join([_entry(texts, caption, f"the cached text outputs of {caption!r}") for caption in said])


def _as_it_is(read: Any) -> Any:
    return read


def _leave_interrupts(_: int) -> None:
    """Ctrl+C reaches all processes of a terminal; the main one decides what it means, and needs its workers until
    then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
