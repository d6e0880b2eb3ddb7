"""Which images are trained on, in which buckets and batches; known before training."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from sfumato.config import DatasetConfig, SubsetConfig, rules
from sfumato.config.data import ONLY_REGULARISATION
from sfumato.data import split
from sfumato.data.batch import Size
from sfumato.data.buckets import Placement, check, place, resolutions
from sfumato.data.many import uncollected
from sfumato.data.scan import ImageFile, Scan, SkippedFile, scan
from sfumato.data.store import FileIndex, Progress
from sfumato.errors import UserError
from sfumato.tensors.random import key, python_random


@dataclass(frozen=True, slots=True)
class Item:
    """An image in its place in a dataset."""

    image: ImageFile
    placement: Placement
    dataset: int
    repeats: int
    """Times it is trained on in an epoch."""

    def key(self, seed: int, epoch: int, repeat: int) -> int:
        """What all randomness of one sample of this image follows from."""
        return key(seed, epoch, self.dataset, self.image.subset, self.image.name, repeat)


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One sample of an epoch."""

    item: int
    """Place in `plan.items`."""
    key: int
    """What all its randomness follows from: `Item.key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All images of a run. Every image file found is in `items` or in `skipped`."""

    datasets: tuple[DatasetConfig, ...]
    items: tuple[Item, ...]
    skipped: tuple[SkippedFile, ...]
    notes: tuple[str, ...]
    """What the user should know, one line each."""
    stride: int
    held_out: tuple[Item, ...] = ()
    """Images that are not trained on, but measured; each once."""

    def subset(self, item: Item) -> SubsetConfig:
        """The options of an image's folder."""
        return self.datasets[item.dataset].subsets[item.image.subset]

    def buckets(self) -> dict[tuple[int, Size], list[int]]:
        """(dataset, bucket) -> places in `items`, in a fixed order."""
        found: dict[tuple[int, Size], list[int]] = defaultdict(list)
        for i, item in enumerate(self.items):
            found[item.dataset, item.placement.bucket].append(i)
        return dict(sorted(found.items()))

    def folders(self) -> dict[tuple[int, int], list[Item]]:
        """(dataset, folder in it) -> its items; in one pass, as both may be many."""
        found: dict[tuple[int, int], list[Item]] = defaultdict(list)
        for item in self.items:
            found[item.dataset, item.image.subset].append(item)
        return found

    def largest(self) -> list[tuple[str, int, int, str]]:
        """Each dataset's bucket of the longest side: whose it is, width, height, what makes it smaller."""
        longest: dict[int, Size] = {}
        for dataset, bucket in self.buckets():
            longest[dataset] = max(bucket, longest.get(dataset, bucket), key=max)
        return [(f"dataset {d + 1}", *size, "lower its resolution or max_bucket_reso") for d, size in longest.items()]

    @uncollected
    def batches(self, epoch: int, seed: int) -> list[tuple[SampleRef, ...]]:
        """The batches of an epoch (counted from 0), over all processes; each bucket's last batch may be smaller."""
        cut: list[tuple[SampleRef, ...]] = []
        for (dataset, bucket), members in self.buckets().items():
            refs = [
                SampleRef(i, self.items[i].key(seed, epoch, repeat))
                for i in members
                for repeat in range(self.items[i].repeats)
            ]
            python_random(seed, epoch, "bucket", dataset, *bucket).shuffle(refs)
            size = self.datasets[dataset].batch_size
            cut += [tuple(refs[start : start + size]) for start in range(0, len(refs), size)]
        python_random(seed, epoch, "batches").shuffle(cut)
        return cut

    @property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch, over all processes."""
        return sum(
            -(-sum(self.items[i].repeats for i in members) // self.datasets[dataset].batch_size)
            for (dataset, _), members in self.buckets().items()
        )

    @property
    def train_samples(self) -> int:
        """Samples of training images in an epoch."""
        return sum(item.repeats for item in self.items if not item.image.is_reg)

    @property
    def reg_samples(self) -> int:
        """Samples of regularisation images in an epoch."""
        return sum(item.repeats for item in self.items if item.image.is_reg)

    def digest(self) -> str:
        """Changes when the batches do: a resumed run compares it."""
        rows = [[i.dataset, i.image.subset, i.image.name, i.repeats, i.placement.bucket] for i in self.items]
        sizes = [dataset.batch_size for dataset in self.datasets]
        return blake2b(json.dumps([rows, sizes]).encode(), digest_size=16).hexdigest()


LARGEST_EPOCH = 2**22
"""Samples of an epoch, of all datasets together: their order is shuffled in memory, with some 150 bytes per sample."""


@uncollected
def make_plan(
    datasets: Sequence[DatasetConfig],
    index: FileIndex,
    *,
    skip_unreadable: bool = False,
    stride: int = 8,
    multiple: int | None = None,
    control: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Find all images and their buckets.

    Each image that `index` does not know is decoded once, so that damaged ones show now. `stride`: image pixels per
    latent pixel; `multiple`: what sides are multiples of, if more than that; `control`: images are to follow those in
    `conditioning_data_dir`, which are masks else. Raises UserError that lists every option
    that cannot act, or every file that cannot be used, with its reason (those are left out and listed in `skipped`
    instead if `skip_unreadable`).
    """
    _check_options(datasets, multiple or stride, control)
    items: list[Item] = []
    skipped: list[SkippedFile] = []
    notes: list[str] = []
    wrong: list[str] = []
    held: list[Item] = []
    train: list[list[Item]] = []
    for d, dataset in enumerate(datasets):
        found = scan(dataset, index, progress, control=control)
        placed, left = _placed(found, dataset, d)
        if placed and all(item.image.is_reg for item in placed):
            wrong.append(f"dataset {d + 1}: {ONLY_REGULARISATION}")
        out = split.held_out([item.image for item in placed], dataset)
        train.append([item for i, item in enumerate(placed) if i not in out])
        held += [replace(item, repeats=1) for i, item in enumerate(placed) if i in out]
        skipped += [replace(skip, dataset=d) for skip in (*found.skipped, *left)]
        notes += found.notes
    away = {item.image.digest for item in held}
    for d, dataset in enumerate(datasets):
        placed, copies = _without_copies(train[d], away)
        placed, unneeded = _repeat_regularisation(placed)
        items += placed
        skipped += [replace(skip, dataset=d) for skip in (*copies, *unneeded)]
        notes += _notes(dataset, placed, unneeded, d)
    notes += split.notes(datasets, *(Counter((i.dataset, i.image.subset) for i in some) for some in (held, items)))
    bad = [skip for skip in skipped if skip.unreadable]
    if bad and not skip_unreadable:
        wrong.append(_listed(bad))
    wrong += _too_many(items)
    if wrong:
        raise UserError(*wrong)
    if not items:
        why = f": validation_split holds all {len(held)} images out" if held else ""
        raise UserError(f"no image is left to train on{why}", *([_listed(bad)] if bad else []))
    return Plan(
        datasets=tuple(datasets),
        items=tuple(items),
        skipped=tuple(skipped),
        notes=tuple(dict.fromkeys(notes)),
        stride=stride,
        held_out=tuple(held),
    )


def _too_many(items: Sequence[Item]) -> list[str]:
    if (samples := sum(item.repeats for item in items)) <= LARGEST_EPOCH:
        return []
    return [
        f"images x num_repeats are {samples:,} samples an epoch, and each is placed by itself: at most "
        f"{LARGEST_EPOCH:,} are possible; "
        "lower num_repeats (dataset_repeats), and train longer by max_train_epochs or max_train_steps"
    ]


def _listed(bad: Sequence[SkippedFile]) -> str:
    lines = list(
        dict.fromkeys(f"  {skip.path}: {skip.reason}" for skip in bad)
    )  # a folder may stand in several datasets
    advice = "fix or remove them, or train without them by skip_unreadable (--skip_unreadable)"
    return "\n".join([f"{len(lines)} image{'s' * (len(lines) != 1)} cannot be used; {advice}:", *lines])


def _check_options(datasets: Sequence[DatasetConfig], multiple: int, control: bool) -> None:
    wrong = []
    if not any(dataset.subsets for dataset in datasets):
        wrong.append(
            "there are no images to train on: name a folder by train_data_dir, or in the file of dataset_config"
        )
    for d, dataset in enumerate(datasets):
        where = f"dataset {d + 1}"
        wrong += [f"{where}: {name}: {message}" for name, message in rules.mistakes(dataset)]
        wrong += [f"{where}: {message}" for message in check(dataset, multiple)]
        for subset in dataset.subsets:
            wrong += [f"{where}, {subset.source}: {message}" for message in _check_subset(subset, control)]
    if wrong:
        raise UserError(*wrong)


def _check_subset(subset: SubsetConfig, control: bool) -> list[str]:
    wrong = [f"{name}: {message}" for name, message in rules.mistakes(subset)]
    if control and not subset.conditioning_data_dir:
        wrong.append("conditioning_data_dir is missing: the folder of the images that these are to follow")
    if subset.alpha_mask and subset.conditioning_data_dir and not control:
        wrong.append("alpha_mask and conditioning_data_dir both give a mask: choose one")
    return wrong


def _placed(found: Scan, dataset: DatasetConfig, number: int) -> tuple[list[Item], list[SkippedFile]]:
    buckets, known = resolutions(dataset), dict[Size, Placement]()
    items, left = [], []
    images, small = _large_enough(found.images, dataset)
    if small:
        some = ", ".join(skip.path.name for skip in small[:5]) + (" ..." if len(small) > 5 else "")
        found.notes.append(f"dataset {number + 1}: {len(small)} images are left out, {small[0].reason} ({some})")
    for image in images:
        try:
            size = image.width, image.height
            placement = known.get(size) or known.setdefault(size, place(size, dataset, buckets))
        except ValueError as error:
            left.append(SkippedFile(image.path, str(error), subset=image.subset))
            continue
        items.append(Item(image, placement, number, image.repeats))
    return items, left + small


def _large_enough(images: Sequence[ImageFile], dataset: DatasetConfig) -> tuple[list[ImageFile], list[SkippedFile]]:
    """Those of more pixels than skip_image_resolution, and the others."""
    limit = dataset.skip_image_resolution
    small = [i for i in images if limit and i.width * i.height <= limit[0] * limit[1]]
    why = f"of no more pixels than skip_image_resolution, {limit[0]}x{limit[1]}" if limit else ""
    away = {i.path for i in small}
    return [i for i in images if i.path not in away], [
        SkippedFile(i.path, why, unreadable=False, subset=i.subset) for i in small
    ]


def _without_copies(items: Sequence[Item], held_out: Collection[str]) -> tuple[list[Item], list[SkippedFile]]:
    """The items whose image is not held out elsewhere. `held_out`: digests of those that are."""
    copies = [item for item in items if item.image.digest in held_out]
    why = "held out of training (validation_split), where it stands once more"
    left = [SkippedFile(item.image.path, why, unreadable=False, subset=item.image.subset) for item in copies]
    return [item for item in items if item.image.digest not in held_out] if copies else list(items), left


def _repeat_regularisation(items: Sequence[Item]) -> tuple[list[Item], list[SkippedFile]]:
    """Regularisation images are repeated until they are as many as the training samples, or cut off there, as
    sd-scripts does."""
    train = [item for item in items if not item.image.is_reg]
    regs = [item for item in items if item.image.is_reg]
    goal, samples = sum(item.repeats for item in train), 0
    used: list[Item] = []
    for item in regs:
        if samples >= goal:
            break
        used.append(item)
        samples += item.repeats
    if used and samples < goal:
        # All are in use: each gets its share of what is missing, the first ones what does not divide.
        share, rest = divmod(goal - samples, len(used))
        used = [replace(item, repeats=item.repeats + share + (i < rest)) for i, item in enumerate(used)]
    reason = f"regularisation image not needed: there are {samples} samples of them for {goal} of training"
    return train + used, [
        SkippedFile(item.image.path, reason, unreadable=False, subset=item.image.subset) for item in regs[len(used) :]
    ]


def _notes(dataset: DatasetConfig, items: Sequence[Item], unneeded: Sequence[SkippedFile], number: int) -> list[str]:
    notes = []
    if dataset.bucket_no_upscale and not dataset.enable_bucket:
        notes.append(f"dataset {number + 1}: bucket_no_upscale acts with enable_bucket only")
    if unneeded:
        notes.append(
            f"dataset {number + 1}: {len(unneeded)} regularisation images are left out: "
            f"{unneeded[0].reason.partition(': ')[2]}"
        )
    regs = [item for item in items if item.image.is_reg]
    if any(item.repeats != item.image.repeats for item in regs):
        samples = sum(item.repeats for item in regs)
        notes.append(
            f"dataset {number + 1}: {len(regs)} regularisation images are repeated to {samples} samples, as many as of "
            "training"
        )
    return notes
