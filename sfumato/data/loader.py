"""The batches of each optimizer step, epoch by epoch; the same whatever the number of workers and processes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sfumato.config import SubsetConfig
from sfumato.data import augment, captions, faces
from sfumato.data.ahead import read_ahead
from sfumato.data.batch import Batch, Tokens
from sfumato.data.buckets import Crop
from sfumato.data.cache import CachedLatents, CachedText, latents_shape
from sfumato.data.plan import Item, Plan, SampleRef
from sfumato.errors import UserError
from sfumato.tensors.noise import Drawn
from sfumato.tensors.random import python_random


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one optimizer step takes."""

    batches: Iterator[Batch]
    """Those of this process, each read when it is asked for; all are to be taken before the next step's."""
    count: int
    """How many they are: as many in every process."""
    samples: int
    """Samples of the step, over all processes."""


@dataclass(frozen=True, slots=True)
class _BatchPlan:
    """One batch to be read."""

    samples: tuple[SampleRef, ...]
    epoch: int
    step: int
    spare: bool = False
    """Whether the batch only keeps this process busy while others have one left; it weighs nothing."""


@dataclass(frozen=True, slots=True)
class _BatchData:
    """What was read of one batch."""

    tensors: dict[str, list[Tensor]]
    lost: dict[int, str]
    """Place in the batch -> why there is nothing to train on: zeros stand there."""


AHEAD = 2
"""Batches that are made while one is in use."""
_GONE = 16
"""So many images that cannot be read, one after another, mean that it is not the images' fault."""


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(slots=True)
class _ImageReader(Dataset[_BatchData]):
    """Reads images or their latents: the part of the work that may run in other processes."""

    plan: Plan
    latents: CachedLatents | None

    def __getitem__(self, batch: _BatchPlan) -> _BatchData:
        samples, lost = [], {}
        for place, ref in enumerate(batch.samples):
            try:
                samples.append(self._sample(ref))
            except UserError as error:
                lost[place] = str(error)
                samples.append(self._zeros(ref))
        names = {name for sample in samples for name in sample}
        return _BatchData({name: [self._or_ones(sample, name) for sample in samples] for name in sorted(names)}, lost)

    def _sample(self, ref: SampleRef) -> dict[str, Tensor]:
        options = self.plan.subset(self.plan.items[ref.item])
        item, crop, flip = _cut(self.plan.items[ref.item], options, ref.key)
        sizes = {"sizes": torch.tensor(_sizes(item, crop, flip))}
        if item.image.control_path:
            sizes["control"] = augment.control(item.image, options, item.placement, crop, flip=flip)
        if self.latents is not None:
            return sizes | self.latents.latents(self.plan, ref.item, flip=flip)
        colours = python_random(ref.key, "colours") if options.color_aug else None
        return sizes | augment.load(
            item.image, options, item.placement, crop, stride=self.plan.stride, flip=flip, colours=colours
        )

    def _zeros(self, ref: SampleRef) -> dict[str, Tensor]:
        """In place of a sample that cannot be read, so that its batch keeps its shape."""
        item = self.plan.items[ref.item]
        sizes = {"sizes": torch.tensor(_sizes(item, item.placement.centre, False))}
        width, height = item.placement.bucket
        if item.image.control_path:
            sizes["control"] = torch.zeros(3, height, width)
        if self.latents is not None:
            return sizes | {"latents": torch.zeros(latents_shape(self.plan, item, self.latents.strategy))}
        return sizes | {"pixels": torch.zeros(3, height, width)}

    def _or_ones(self, sample: Mapping[str, Tensor], name: str) -> Tensor:
        """An image without a mask among others that have one counts everywhere."""
        if name in sample or name != "mask":
            return sample[name]
        height, width = sample["sizes"][4:].tolist()
        return torch.ones(1, height // self.plan.stride, width // self.plan.stride)


def _cut(item: Item, options: SubsetConfig, key: int) -> tuple[Item, Crop, bool]:
    """An image as it is resized for a sample, where that is cut out of it, and whether it is mirrored."""
    flip = options.flip_aug and python_random(key, "flip").random() < 0.5
    if options.face_crop_aug_range and (face := faces.face(item.image.path)):
        size = item.image.width, item.image.height
        placement, crop = faces.around(size, face, item.placement, options, python_random(key, "crop"))
        return replace(item, placement=placement), crop, flip
    if options.random_crop:
        return item, augment.random_crop(item.placement, python_random(key, "crop")), flip
    return item, item.placement.centre, flip


def _sizes(item: Item, crop: Crop, flip: bool) -> list[int]:
    """Original height and width, crop top and left in the mirrored image if it is one, target height and width."""
    left, top = item.placement.mirrored(crop) if flip else crop
    return [item.image.height, item.image.width, top, left, item.placement.bucket[1], item.placement.bucket[0]]


class _Queue(Sampler[_BatchPlan]):
    """Hands the batches of the current epoch to the readers, which live on."""

    def __init__(self) -> None:
        self.batches: Sequence[_BatchPlan] = ()

    def __iter__(self) -> Iterator[_BatchPlan]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(slots=True, kw_only=True)
class Loader:
    """Makes the batches of a plan.

    Every sample follows from (seed, epoch, image, repeat) alone; see `Item.key`. Batches are made ahead of their steps,
    in a thread; images are read there, or by `workers` other processes (none when latents are in memory and no images
    are followed: then there is nothing to read).
    """

    plan: Plan
    seed: int
    tokenize: Callable[[Sequence[str]], Tokens] | None = None
    """Captions -> tokens; called in this process. Not needed with `texts`."""
    latents: CachedLatents | None = None
    """None: batches carry pixels."""
    texts: CachedText | None = None
    """None: batches carry tokens."""
    draw: Callable[[Tensor, Sequence[int]], Drawn] = lambda sizes, keys: {}
    """(`Batch.sizes`, `Batch.keys`) -> `Batch.drawn`."""
    pack: Callable[[Batch], Batch] = lambda batch: batch
    """A last change to batches, made ahead as well: `Batch.pack` where they are copied to a device."""
    ahead: int = AHEAD
    """Batches that are made while one is in use; 0: each when it is asked for, in this thread."""
    prior_loss_weight: float = 1.0
    accumulation: int = 1
    """Batches a process takes for one optimizer step."""
    rank: int = 0
    """Which of `world` processes this is. They take batches in turn; where the last turn does not go round, the rest
    get a batch again with weight 0: all do the same number of steps, on the samples that one process would take."""
    world: int = 1
    steps: int = 0
    """Optimizer steps of the run: what a `token_warmup_step` below 1 is a share of."""
    workers: int = 0
    persistent: bool = False
    """Keep the workers between epochs."""
    notice: Callable[[str], object] = _say
    """Called, once per image, with a message on one that cannot be read any more."""
    _lost: set[int] = field(init=False, default_factory=set)
    _lost_in_a_row: set[int] = field(init=False, default_factory=set)
    """Images that could not be read, since one could."""
    _queue: _Queue = field(init=False, default_factory=_Queue)
    _coming: tuple[int, Iterator[Batch]] | None = field(init=False, default=None)
    """The next epoch, and the batches from there on."""
    _cut: tuple[int, list[tuple[list[_BatchPlan], int]]] = field(init=False, default=(-1, []))
    _reader: DataLoader[_BatchData] = field(init=False)
    _subsets: list[list[SubsetConfig]] = field(init=False)

    def __post_init__(self) -> None:
        in_memory = self.latents is not None and self.latents.store.root is None
        idle = in_memory and not any(item.image.control_path for item in self.plan.items)
        workers = 0 if idle else self.workers
        self._reader = DataLoader(
            _ImageReader(self.plan, self.latents),
            batch_size=None,
            sampler=self._queue,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts,
            persistent_workers=self.persistent and workers > 0,
            generator=torch.Generator(),  # else torch would use the global one
        )
        self._subsets = [[self._whole_warmup(subset) for subset in dataset.subsets] for dataset in self.plan.datasets]

    def _whole_warmup(self, subset: SubsetConfig) -> SubsetConfig:
        if 0 < subset.token_warmup_step < 1 and not self.steps:
            raise UserError(
                f"{subset.source}: token_warmup_step {subset.token_warmup_step} is a share of the run: its steps "
                "must be known"
            )
        return replace(subset, token_warmup_step=captions.with_whole_warmup(subset, self.steps))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatches]:
        """The optimizer steps of an epoch (counted from 0), from its `start_step`-th on. The next one is read ahead at
        its end, until that is asked for or `close` is called."""
        following, batches = self._coming or (-1, iter(()))
        self._coming = None
        if (following, 0) != (epoch, start_step):
            batches = self._read(epoch, start_step)
        for mine, samples in self._steps(epoch)[start_step:]:
            yield StepBatches(islice(batches, len(mine)), len(mine), samples)
        if self._reader.num_workers == 0:
            self._coming = epoch + 1, batches

    def close(self) -> None:
        """Read nothing more ahead."""
        self._coming = None

    def _steps(self, epoch: int) -> list[tuple[list[_BatchPlan], int]]:
        """The batches of this process in each step of an epoch, and the number of samples in those of all; those of the
        last epoch that was asked for are kept, as reading them and counting them both ask."""
        known, steps = self._cut
        if known != epoch:
            steps = self._cut_steps(epoch)
            self._cut = epoch, steps
        return steps

    def _cut_steps(self, epoch: int) -> list[tuple[list[_BatchPlan], int]]:
        batches, group = self.plan.batches(epoch, self.seed), self.accumulation * self.world
        starts = range(0, len(batches), group)
        steps = []
        for i, start in enumerate(starts):
            whole = batches[start : start + group]
            turns = -(-len(whole) // self.world)
            mine = [
                _BatchPlan(batches[n % len(batches)], epoch, epoch * len(starts) + i, spare=n >= len(batches))
                for n in range(start + self.rank, start + turns * self.world, self.world)
            ]
            steps.append((mine, sum(map(len, whole))))
        return steps

    def _read(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """The batches from there on, epoch after epoch; of one epoch where other processes read images: they are
        started here, for a process that other threads are at work in is not to be forked."""
        first = self._planned(epoch, start_step)
        later = (pair for n in count(epoch + 1) for pair in self._planned(n))
        read = first if self._reader.num_workers else chain(first, later)
        made = ((*pair, self._batch(*pair)) for pair in read)
        for planned, data, batch in read_ahead(made, self.ahead) if self.ahead else made:
            self._account(planned, data.lost)
            yield batch

    def _planned(self, epoch: int, start_step: int = 0) -> Iterator[tuple[_BatchPlan, _BatchData]]:
        """Begin to read an epoch."""
        self._queue.batches = [batch for mine, _ in self._steps(epoch)[start_step:] for batch in mine]
        return zip(self._queue.batches, iter(self._reader), strict=True)

    def _account(self, batch: _BatchPlan, lost: Mapping[int, str]) -> None:
        """Report what was lost. Raises UserError when nothing can be read any more."""
        for place, ref in enumerate(batch.samples):
            if place not in lost:
                self._lost_in_a_row.clear()
                continue
            if ref.item not in self._lost:
                self._lost.add(ref.item)
                self.notice(f"{lost[place]}; training goes on without it")
            self._lost_in_a_row.add(ref.item)
            if len(self._lost_in_a_row) >= min(_GONE, len(self.plan.items)):
                raise UserError(
                    f"{lost[place]}; nor could the {len(self._lost_in_a_row) - 1} images before it be read: are "
                    "their folders still there?"
                )

    def _batch(self, batch: _BatchPlan, data: _BatchData) -> Batch:
        items = [self.plan.items[ref.item] for ref in batch.samples]
        texts = [self._caption(item, ref.key, batch) for item, ref in zip(items, batch.samples, strict=True)]
        weights = [self.prior_loss_weight if item.image.is_reg else 1.0 for item in items]
        weights = [0.0 if batch.spare or place in data.lost else weight for place, weight in enumerate(weights)]
        kept = [self.plan.subset(item).preserved for item in items]
        stacked = {name: torch.stack(values) for name, values in data.tensors.items()}
        keys = [ref.key for ref in batch.samples]
        made = Batch(
            captions=texts,
            keys=keys,
            weight=torch.tensor(weights),
            preserve=torch.tensor(kept, dtype=torch.float32) if any(kept) else None,
            multiplier=torch.tensor([self.plan.datasets[item.dataset].network_multiplier for item in items]),
            sizes=stacked["sizes"],
            latents=stacked.get("latents"),
            pixels=stacked.get("pixels"),
            mask=stacked.get("mask"),
            control=stacked.get("control"),
            cond=self.texts.cond(texts) if self.texts else None,
            tokens=self.tokenize(texts) if self.tokenize and not self.texts else None,
            drawn=self.draw(stacked["sizes"], keys),
        )
        return self.pack(made)

    def _caption(self, item: Item, key: int, batch: _BatchPlan) -> str:
        options = self._subsets[item.dataset][item.image.subset]
        return captions.vary(
            item.image.captions, options, python_random(key, "caption"), epoch=batch.epoch + 1, step=batch.step
        )


def _as_it_is(data: Any) -> Any:
    return data


def _leave_interrupts(_: int) -> None:
    """Ctrl+C reaches all processes of a terminal; the main one decides what it means, and needs its workers until
    then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
