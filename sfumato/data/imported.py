"""What sd-scripts has cached beside the images, taken over where it fits: latents and text outputs.

Its files say neither which net made them nor of which caption they are. So a few of them are compared with what this
run's own net gives, and the others are believed when those agree; a file older than its image or caption is not used.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.data import augment
from sfumato.data.batch import Size
from sfumato.data.caption_files import caption_files
from sfumato.data.plan import Item, Plan
from sfumato.data.scan import ImageFile
from sfumato.data.strategies import KohyaLatents, LatentsCachingStrategy, TextEncoderOutputsCachingStrategy

Entry = Mapping[str, Tensor]
Readers = Mapping[str, Callable[[Entry], Entry | None]]
"""Key of an entry -> what reads its file of sd-scripts, for those that have one: (an entry of ours for another image or
caption) -> the entry, or None where the file does not fit."""

COMPARED = 4
"""Files that are compared with our own entries before the others are believed."""
FARTHEST_LATENTS = 0.2
"""Relative distance of latents that are of one VAE: sd-scripts keeps a sample of the posterior, we its mean. Another
VAE, crop or scaling is more than twice as far away."""
FARTHEST_TEXTS = 0.1
"""The same of text outputs, which differ by the rounding of their number formats; those of another caption, or of
fine-tuned encoders, by more."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """The entries that were made of sd-scripts' files and those that were encoded, of those that have such a file, and
    why none was used."""

    taken: Sequence[str] = ()
    encoded: Sequence[str] = ()
    refused: str = ""


def adopt(
    readers: Readers,
    make: Callable[[Sequence[str]], None],
    stored: Callable[[str], Entry | None],
    put: Callable[[str, Entry], None],
    farthest: float,
) -> Adopted:
    """Make the entries that have a file of sd-scripts.

    `make`: encodes and stores, as without such files; `stored`: what it stored; `put`: stores.
    """
    keys = list(readers)
    if len(keys) <= COMPARED:
        return Adopted()  # to compare them is to encode them all
    spot = _spread(keys, COMPARED)
    make(spot)
    own = {key: entry for key in spot if (entry := stored(key)) is not None}
    pairs = [(entry, theirs) for key, entry in own.items() if (theirs := readers[key](entry)) is not None]
    apart = max((distance(*pair) for pair in pairs), default=float("inf"))
    if apart > farthest:
        return Adopted(encoded=spot, refused=_why(len(keys), apart))
    like, taken = pairs[0][0], []
    for key in keys:
        if key not in spot and (theirs := readers[key](like)) is not None:
            put(key, theirs)
            taken.append(key)
    return Adopted(taken, spot)


def _spread(keys: Sequence[str], n: int) -> list[str]:
    """n of more, from the first to the last."""
    return [keys[i * (len(keys) - 1) // (n - 1)] for i in range(n)]


def _why(count: int, apart: float) -> str:
    off = f"are {apart:.0%} off what this run's net gives"
    how = "do not fit in shape or content" if apart == float("inf") else off
    return f"{count} files of sd-scripts are not used: they {how}, and may be of another model or setting"


def distance(own: Entry, theirs: Entry) -> float:
    """How far two entries are apart, relative to the first; the largest of their tensors. Infinite where they differ in
    names, shapes or whole numbers.

    States (n, d) are compared token by token, so that those of large norm, which all captions share, do not hide the
    others.
    """
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in theirs.items()}:
        return float("inf")
    return max((_distance(own[name], theirs[name]) for name in own), default=0.0)


def _distance(own: Tensor, theirs: Tensor) -> float:
    if not own.is_floating_point():
        return 0.0 if torch.equal(own, theirs) else float("inf")
    if not own.numel():
        return 0.0
    a, b = (t.float().reshape(len(t) if t.ndim == 2 else 1, -1) for t in (own, theirs))
    return float(((a - b).norm(dim=1) / a.norm(dim=1).clamp(min=1e-6)).mean())


# --- latents ---


def latent_readers(
    plan: Plan,
    wanted: Mapping[str, tuple[Item, Sequence[int]]],
    strategy: LatentsCachingStrategy,
    unscale: Callable[[Tensor], Tensor],
) -> Readers:
    """`wanted`: key -> item and shape (c, h, w) of its latents. `unscale`: latents of the denoiser -> raw ones."""
    kohya, files, readers = strategy.kohya, _Files(), {}

    def read(path: Path, item: Item, shape: Sequence[int]) -> Entry | None:
        subset, place = plan.subset(item), item.placement
        found = latents(path, (item.image.width, item.image.height), shape, flip=subset.flip_aug)
        if found is None:
            return None
        raw = {n: (unscale(t) if kohya and kohya.scaled else t).to(strategy.dtype) for n, t in found.items()}
        if subset.alpha_mask or item.image.mask_path:
            raw["mask"] = augment.load(item.image, subset, place, place.centre, stride=plan.stride)["mask"]
        return _finite(raw)

    for key, (item, shape) in wanted.items() if kohya else ():
        if kohya and (path := _latents_file(files, item.image, kohya)):
            readers[key] = lambda _, args=(path, item, shape): read(*args)
    return readers


def _latents_file(files: _Files, image: ImageFile, kohya: KohyaLatents) -> Path | None:
    """Where sd-scripts has an image's latents: `name_0640x0512_sdxl.npz`, by its size, or `name.npz`."""
    sized = [f"_{image.width:04d}x{image.height:04d}{suffix}" for suffix in kohya.suffixes]
    return files.beside(image.path, [*sized, *([".npz"] if kohya.plain else [])], since=image.path)


def latents(path: Path, size: Size, shape: Sequence[int], *, flip: bool) -> dict[str, Tensor] | None:
    """{"latents": (c, h, w)}, and {"latents_flipped": ...} with `flip`, in fp32 as they are kept; None if the file has
    none of this `shape`, or they are of an image of another `size`."""
    found = arrays(path)
    names = ["latents", "latents_flipped"] if flip else ["latents"]
    for key in (f"_{shape[1]}x{shape[2]}", ""):  # files of several sizes have theirs behind the names
        parts = [found[name + key] for name in names if name + key in found]
        original = found.get(f"original_size{key}")
        if len(parts) == len(names) and original is not None and original.flatten().tolist() == list(size):
            # A VAE of videos gives one frame.
            values = [part.squeeze(1) if part.ndim == 4 else part for part in parts]
            if all(list(value.shape) == list(shape) and value.is_floating_point() for value in values):
                return {name: value.float() for name, value in zip(names, values, strict=True)}
    return None


# --- text outputs ---


def text_readers(plan: Plan, wanted: Mapping[str, str], strategy: TextEncoderOutputsCachingStrategy) -> Readers:
    """`wanted`: caption -> key."""
    kohya, files, readers = strategy.kohya, _Files(), {}

    def read(path: Path, like: Entry) -> Entry | None:
        try:
            found = kohya.read(arrays(path), like) if kohya else None
        except (KeyError, IndexError, RuntimeError):
            return None
        if found is None or not _alike(found, like, strategy):
            return None
        return _finite({name: t.to(like[name].dtype) for name, t in found.items()})

    for item in plan.items if kohya and wanted else ():
        # sd-scripts keeps the outputs of the caption as it is written: not those of a prior_preservation_class.
        other = item.image.is_reg and plan.subset(item).preserved
        key = None if other else wanted.get(item.image.captions[0])
        if kohya and key and key not in readers and (path := _text_file(files, plan, item, kohya.suffix)):
            readers[key] = partial(read, path)
    return readers


def _alike(entry: Entry, like: Entry, strategy: TextEncoderOutputsCachingStrategy) -> bool:
    """Whether an entry has the fields and shapes of another caption's; the rows of ragged ones are its own."""
    return entry.keys() == like.keys() and all(
        t.ndim == like[name].ndim and t.shape[name in strategy.ragged :] == like[name].shape[name in strategy.ragged :]
        for name, t in entry.items()
    )


def _text_file(files: _Files, plan: Plan, item: Item, suffix: str) -> Path | None:
    """Where sd-scripts has the text outputs of an image's one caption, if it was made after that was written."""
    image, subset = item.image, plan.subset(item)
    said = [Path(subset.metadata_file)] if subset.metadata_file else caption_files(image.path, subset)
    since = next((file for file in said if file.exists()), None)
    return files.beside(image.path, [suffix], since=since) if since and len(image.captions) == 1 else None


# --- files ---


def arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an `.npz`; none of a file that is none. Nothing in it is executed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception:  # NumPy and zipfile raise many kinds on damaged files, and of memory that a header makes up
        return {}


def _finite(entry: Entry) -> Entry | None:
    return entry if all(bool(torch.isfinite(t).all()) for t in entry.values()) else None


class _Files:
    """Which files lie beside images, each folder listed once."""

    def __init__(self) -> None:
        self._known: dict[Path, frozenset[str]] = {}

    def beside(self, image: Path, endings: Iterable[str], *, since: Path) -> Path | None:
        """The first file of the image's stem with one of these endings, if `since` has not changed after it."""
        folder = image.parent
        if folder not in self._known:
            try:
                self._known[folder] = frozenset(name for name in os.listdir(folder) if name.endswith(".npz"))
            except OSError:
                self._known[folder] = frozenset()
        path = next((folder / n for ending in endings if (n := image.stem + ending) in self._known[folder]), None)
        try:
            found = path.stat() if path else None
            fits = found and stat.S_ISREG(found.st_mode) and since.stat().st_mtime_ns <= found.st_mtime_ns
            return path if fits else None
        except OSError:
            return None
