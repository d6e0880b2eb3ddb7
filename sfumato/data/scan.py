"""The images of a dataset's folders: what they are, found without changing or guessing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

from PIL import Image

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.data import classes, faces, metadata
from sfumato.data.caption_files import ending, read_captions
from sfumato.data.folders import Listing, listing
from sfumato.data.images import Unreadable, read
from sfumato.data.sources import Captions, Source, sources
from sfumato.data.store import FileIndex, Progress
from sfumato.errors import UserError
from sfumato.formats.files import stamp
from sfumato.formats.paths import absolute, trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """An image as found, with its mask and its caption."""

    path: Path
    name: str
    """Path relative to the subset's folder, with `/`: with the numbers of dataset and subset, its identity in a run."""
    width: int
    height: int
    """Pixels, after EXIF orientation."""
    captions: tuple[str, ...]
    """The caption file's lines that are not blank; the class tokens where there is no file; else one empty line."""
    subset: int
    is_reg: bool
    repeats: int
    mask_path: Path | None = None
    control_path: Path | None = None
    """The image that this one is to follow."""
    digest: str = ""
    """Hash of the file's bytes."""
    mask_digest: str = ""
    control_digest: str = ""
    source: classes.ImageSource | None = field(default=None, compare=False, repr=False)
    """What gives the image in place of its file."""

    def open(self) -> Image.Image:
        """In RGB, or RGBA where it has transparency, upright. Raises UserError naming the file."""
        if self.source is None:
            return open_image(self.path, self.digest)
        try:
            image = classes.image(self.source, self.name)
        except Unreadable as error:
            raise UserError(f"{self.path}: {error}") from error
        if image.size != (self.width, self.height):
            raise UserError(f"{self.path}: is {image.width}x{image.height}, and was {self.width}x{self.height}")
        return image


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file that was found and is not used."""

    path: Path
    reason: str
    unreadable: bool = True
    """Whether something is wrong with it (False: it is simply not needed)."""
    subset: int = 0
    """The folder in its dataset, and the dataset, that would have used it."""
    dataset: int = 0


@dataclass(slots=True)
class Scan:
    """What the folders of a dataset hold: every image file is in `images` or in `skipped`."""

    images: list[ImageFile] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the user should know, one line each."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an image file is; `problem` says why it cannot be read."""

    width: int = 0
    height: int = 0
    digest: str = ""
    problem: str = ""


def scan(dataset: DatasetConfig, index: FileIndex, progress: Progress | None = None, *, control: bool = False) -> Scan:
    """Look through the folders of a dataset.

    Every image is decoded once, so that damaged ones are known now, and hashed; what is known of a file that has not
    changed is taken from `index`, without opening it. `control`: what `conditioning_data_dir` holds is to be followed,
    and is no mask.
    Raises UserError for folders that are missing or empty, all at once.
    """
    given = sources(dataset.subsets)
    listings = [each.listing for each in given]
    pairs = [_pairs(subset, found.images) for subset, found in zip(dataset.subsets, listings, strict=True)]
    wanted = [p for each in given if not each.images for p in each.listing.images]
    wanted += [m for of in pairs for m in of.values()]
    stamps: dict[Path, list[int]] = {}
    for listed in listings:
        stamps |= listed.stamps
    facts = examine(wanted, index, progress, stamps)
    result = Scan()
    for i, subset in enumerate(dataset.subsets):
        result.notes += _left_alone(subset, listings[i])
        result.skipped += [SkippedFile(path, reason, subset=i) for path, reason in listings[i].troubles]
        paths = listings[i].images
        made = _of_class(given[i], progress)
        lines = given[i].lines
        captions = list(map(lines, paths)) if lines else read_captions(paths, subset, index)
        _add_subset(result, i, subset, given[i], pairs[i], facts | made if made else facts, captions, control)
    pictures = (each.listing.images for each in given)
    result.notes += faces.notes(zip(dataset.subsets, pictures, strict=True))
    return result


def examine(
    paths: Sequence[Path],
    index: FileIndex,
    progress: Progress | None = None,
    stamps: Mapping[Path, list[int]] = MappingProxyType({}),
) -> dict[Path, Facts]:
    """What each image file is, from the index where the file has not changed since (its stamp: size, times, number),
    else from the file. `stamps`: of those that were looked at just now."""
    names = {path: absolute(path) for path in paths}
    known = index.read("picture", names.values())
    facts: dict[Path, Facts] = {}
    todo = []
    for path, name in names.items():
        row = known.get(name)
        if isinstance(row, dict) and (found := _remembered(row, stamps.get(path) or stamp(path))):
            facts[path] = found
        else:
            todo.append(path)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In portions, so that a run that is killed here has stored most of what it found.
        for start in range(0, len(todo), 256):
            portion = todo[start : start + 256]
            before = {p: stamp(p) for p in portion}
            fresh = dict(zip(portion, pool.map(_examine, portion), strict=True))
            facts |= fresh
            # A problem is not remembered: it may be fixed without touching the file (a plug-in that was missing).
            rows = {names[p]: _row(f, before[p]) for p, f in fresh.items() if not f.problem}
            index.write("picture", rows)
            if progress:
                progress(start + len(portion), len(todo))
    return facts


def _of_class(given: Source, progress: Progress | None = None) -> dict[Path, Facts]:
    """What each image of a user's class is; nothing is remembered, for it may give another each time."""
    source, found = given.images, {}
    for path in given.listing.images if source else ():
        try:
            assert source is not None
            image = classes.image(source, path.as_posix())
            found[path] = Facts(image.width, image.height, classes.digest(image))
        except Unreadable as error:
            found[path] = Facts(problem=str(error))
        if progress:
            progress(len(found), len(given.listing.images))
    return found


def _remembered(row: Mapping[str, object], now: list[int]) -> Facts | None:
    """What the index knows of a file that has not changed; None when it has, or when the row is damaged."""
    width, height, digest = row.get("width"), row.get("height"), row.get("digest")
    if row.get("stamp") != now or not digest or not isinstance(digest, str):
        return None
    return (
        Facts(width, height, digest)
        if type(width) is int and type(height) is int and width > 0 and height > 0
        else None
    )


def _row(facts: Facts, of: list[int]) -> dict[str, object]:
    return {"stamp": of, "width": facts.width, "height": facts.height, "digest": facts.digest}


def _examine(path: Path) -> Facts:
    try:
        data = path.read_bytes()
        image = read(BytesIO(data), path.suffix)
        return Facts(image.width, image.height, _digest(data))
    except (Unreadable, OSError) as error:
        return Facts(problem=str(error))


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=20).hexdigest()


def _left_alone(subset: SubsetConfig, found: Listing) -> list[str]:
    unknown = [
        f"{n} {suffix}" for suffix, n in found.others.most_common() if suffix not in (*_EXPECTED, ending(subset))
    ]
    return [f"{subset.image_dir}: not images, left alone: {', '.join(unknown)}"] if unknown else []


_EXPECTED = (".txt", ".caption", ".json", ".jsonl", ".npz", ".safetensors", ".toml", ".md")


def _pairs(subset: SubsetConfig, paths: Sequence[Path]) -> dict[Path, Path]:
    """The image in `conditioning_data_dir` that belongs to each: the same relative name, or else with any image ending.
    Errors: `UserError` where several have that."""
    if not subset.conditioning_data_dir:
        return {}
    folder, root = Path(subset.conditioning_data_dir), Path(subset.image_dir)
    if wrong := trouble(folder, "folder"):
        raise UserError(f"conditioning_data_dir {subset.conditioning_data_dir!r}: {wrong}")
    by_stem: dict[str, list[Path]] = {}
    for found in listing(folder, recursive=True).images:
        by_stem.setdefault(os.path.splitext(found.relative_to(folder).as_posix())[0], []).append(found)
    # Images that a metadata file names may lie elsewhere; those of a class have no folder.
    inside = root.as_posix().rstrip("/") + "/"
    names = {p: Path(p.name) if p.is_absolute() and not p.is_relative_to(root) else p for p in paths}
    pairs: dict[Path, Path] = {}
    several: list[str] = []
    for path, name in names.items():
        like = by_stem.get(os.path.splitext(name.as_posix().removeprefix(inside))[0], [])
        if exact := [other for other in like if other.name == path.name] or like:
            pairs[path] = exact[0]
            several += [f"{path.name} ({', '.join(other.name for other in exact)})"] * (len(exact) > 1)
    if several:
        some = ", ".join(several[:5]) + (" ..." if len(several) > 5 else "")
        raise UserError(f"conditioning_data_dir {folder}: several images go with one: {some}; leave one for each")
    return pairs


def _add_subset(
    result: Scan,
    number: int,
    subset: SubsetConfig,
    given: Source,
    pairs: dict[Path, Path],
    facts: dict[Path, Facts],
    captions: Sequence[Captions],
    control: bool,
) -> None:
    bare, blank, long = [], [], []
    # `relative_to` takes long for many images. A class gives names that stand in no folder.
    inside = "" if given.images else Path(subset.image_dir).as_posix().rstrip("/") + "/"
    for path, found in zip(given.listing.images, captions, strict=True):
        pair, image = pairs.get(path), facts[path]
        if reason := _problem(subset, image, pair, facts, found, "image to follow" if control else "mask image"):
            result.skipped.append(SkippedFile(path, reason, subset=number))
            continue
        assert not isinstance(found, str)
        lines = found if found is not None else (subset.class_tokens or "",)
        bare += [path] if found is None and not subset.class_tokens else []
        blank += [path] if found == ("",) else []
        long += [path] if len(lines) > 1 and not subset.enable_wildcard else []
        result.images.append(
            ImageFile(
                path=path,
                name=path.as_posix().removeprefix(inside),
                width=image.width,
                height=image.height,
                captions=lines,
                subset=number,
                is_reg=subset.is_reg,
                repeats=subset.num_repeats,
                mask_path=None if control else pair,
                control_path=pair if control else None,
                digest=image.digest,
                mask_digest=facts[pair].digest if pair and not control else "",
                control_digest=facts[pair].digest if pair and control else "",
                source=given.images,
            )
        )
    result.notes += _caption_notes(subset, bare, blank, long)
    if given.described and subset.metadata_file:
        why = f"not named in {subset.metadata_file}"
        result.skipped += [SkippedFile(path, why, unreadable=False, subset=number) for path in given.described.others]
        known = [(path, facts[path]) for path in given.listing.images if not facts[path].problem]
        sizes = ((path, (each.width, each.height)) for path, each in known)
        result.notes += metadata.notes(given.described, subset.metadata_file, sizes)


def _problem(
    subset: SubsetConfig,
    image: Facts,
    pair: Path | None,
    facts: dict[Path, Facts],
    captions: Captions,
    kind: str,
) -> str:
    """Why an image cannot be used, or nothing. `kind`: what its pair is."""
    if image.problem:
        return image.problem
    if isinstance(captions, str):
        return captions
    if subset.conditioning_data_dir:
        if pair is None:
            return f"no {kind} of this name in conditioning_data_dir {subset.conditioning_data_dir}"
        of_pair = facts[pair]
        if of_pair.problem:
            return f"its {kind} {pair}: {of_pair.problem}"
        # They may be smaller or larger than their images, to a pixel's rounding, but not of another shape.
        if abs(of_pair.width * image.height - of_pair.height * image.width) > max(
            image.width, image.height, of_pair.width, of_pair.height
        ):
            return (
                f"its {kind} {pair} is {of_pair.width}x{of_pair.height}: not the shape of the image, "
                f"{image.width}x{image.height}"
            )
    return ""


def _caption_notes(
    subset: SubsetConfig, bare: Sequence[Path], blank: Sequence[Path], long: Sequence[Path]
) -> list[str]:
    notes, files = [], not (subset.metadata_file or subset.dataset_class)
    if bare:
        other = next(
            (s for s in (".txt", ".caption") if s != ending(subset) and os.path.exists(bare[0].with_suffix(s))), None
        )
        hint = f"; there are {other} files: set caption_extension" if other else ""
        what = f"a {ending(subset)} caption" if files else "a caption from it"
        notes.append(
            f"{subset.source}: {len(bare)} images have neither {what} nor class_tokens and train with an empty "
            f"caption ({_some(bare)}){hint}"
        )
    if blank:
        empty = f"{subset.source}: {len(blank)} caption{' files' if files else 's'} have no text"
        notes.append(f"{empty}, and their images train with an empty caption ({_some(blank)})")
    if long:
        many = f"{subset.source}: {len(long)} captions have several lines"
        notes.append(f"{many} and only the first is used ({_some(long)}); enable_wildcard chooses one each time")
    return notes


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(p.name for p in paths[:5]) + (" ..." if len(paths) > 5 else "")


def open_image(path: Path, digest: str = "") -> Image.Image:
    """An image in RGB, or RGBA where it has transparency, upright. Raises UserError naming the file.

    `digest`: of the bytes that are expected, as in `ImageFile`; other ones are refused.
    """
    if wrong := trouble(path):
        raise UserError(f"{path}: {wrong}")
    try:
        data = path.read_bytes()
        if digest and _digest(data) != digest:
            raise Unreadable("the file has changed since this run first read it")
        return read(BytesIO(data), path.suffix)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
