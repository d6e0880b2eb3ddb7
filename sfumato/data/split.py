"""Which images are kept out of training, to be measured on."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from sfumato.config import DatasetConfig
from sfumato.data.scan import ImageFile
from sfumato.errors import UserError

Folder = tuple[int, int]
"""A dataset's number, and the folder's in it."""


def held_out(images: Sequence[ImageFile], dataset: DatasetConfig) -> set[int]:
    """The places of the images that the `validation_split` of a dataset's folders holds out.

    A folder's images, by name, are shuffled by `validation_seed` and the last round(count * validation_split) of them
    held out, which are sd-scripts' (sd-scripts trains on ceil(count * (1 - validation_split)), so that one image may be
    in both; here it is held out). Regularisation images and preserved ones never are.
    """
    folders: dict[int, list[int]] = defaultdict(list)
    for place, image in enumerate(images):
        folders[image.subset].append(place)
    held: set[int] = set()
    for number, places in folders.items():
        options = dataset.subsets[number]
        if options.validation_split and options.learnt:
            random.Random(options.validation_seed).shuffle(places)
            held |= {*places[len(places) - round(len(places) * options.validation_split) :]}
    return held


def notes(datasets: Sequence[DatasetConfig], held: Counter[Folder], trained: Counter[Folder]) -> list[str]:
    """How many images of which folder are held out. Errors: `UserError` if none is, though some are to be."""
    lines, asked = [], []
    for d, dataset in enumerate(datasets):
        for s, subset in enumerate(dataset.subsets):
            if subset.validation_split and not subset.learnt:
                lines.append(f"{subset.source}: validation_split: no effect where nothing is learnt")
            elif subset.validation_split:
                count = held[d, s] + trained[d, s]
                lines.append(f"{subset.source}: {held[d, s]} of {count} images are held out (validation_split)")
                asked.append(f"{subset.validation_split:g} of {count} images in {subset.source}")
    if asked and not held.total():
        raise UserError(f"validation_split holds no image out ({'; '.join(asked)}): raise it, or leave it out")
    return lines
