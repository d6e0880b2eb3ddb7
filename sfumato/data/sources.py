"""What gives a subset its images and captions: a folder, a metadata file or a class of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sfumato.config import SubsetConfig
from sfumato.data import classes, metadata
from sfumato.data.folders import SUFFIXES, Listing, listing
from sfumato.errors import UserError
from sfumato.formats.paths import trouble

Captions = tuple[str, ...] | str | None
"""The lines of an image's caption that are not blank, None where there is none, or a string: what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Source:
    """The images of a subset."""

    listing: Listing
    lines: Callable[[Path], Captions] | None = None
    """The caption of an image; None where it stands in a file beside it."""
    images: classes.ImageSource | None = None
    """What gives the images, where they are no files."""
    described: metadata.Described | None = None


def sources(subsets: Sequence[SubsetConfig]) -> list[Source]:
    """Of each subset. Errors: `UserError`, for all of them at once."""
    found: list[Source] = []
    wrong: list[str] = []
    for subset in subsets:
        try:
            found.append(_source(subset))
        except UserError as error:
            wrong += error.messages
    if wrong:
        raise UserError(*wrong)
    return found


def _source(subset: SubsetConfig) -> Source:
    if subset.dataset_class:
        made = classes.make(subset.dataset_class, subset.image_dir)
        paths = [Path(name) for name in classes.names(made, subset.dataset_class)]
        return Source(Listing(images=paths), lambda path: classes.lines(made, path.as_posix()), made)
    if subset.metadata_file:
        described = metadata.describe(subset.metadata_file, subset.image_dir, recursive=subset.recursive)
        return Source(described.listing, partial(_described, described, subset), described=described)
    return Source(_folder(subset))


def _described(described: metadata.Described, subset: SubsetConfig, path: Path) -> Captions:
    return described.records[path].lines(subset)


def _folder(subset: SubsetConfig) -> Listing:
    """What lies in a subset's folder. Errors: `UserError` when it is missing or has no images."""
    if wrong := trouble(subset.image_dir, "folder"):
        raise UserError(f"image_dir {subset.image_dir!r}: {wrong}")
    folder = Path(subset.image_dir)
    found = listing(folder, recursive=subset.recursive)
    if found.images or any(path != folder for path, _ in found.troubles):
        return found
    if found.troubles:
        raise UserError(f"image_dir {subset.image_dir}: {found.troubles[0][1]}")
    others = ", ".join(f"{n} {suffix}" for suffix, n in found.others.most_common())
    only = f"; only {others}" if others else ""
    hint = "" if subset.recursive else "; `recursive = true` looks into sub-folders"
    raise UserError(f"image_dir {subset.image_dir}: no images in this folder ({', '.join(SUFFIXES)}){only}{hint}")
