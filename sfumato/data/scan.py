"""The pictures of a dataset's folders: what they are, found without changing or guessing anything."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

from PIL import Image

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.data.pictures import SUFFIXES, Unreadable, oriented_size, read
from sfumato.data.store import Index
from sfumato.errors import UserError

Progress = Callable[[int, int], None]
"""Told (done, total) as work goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture as found, with its mask and its caption."""

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
    digest: str = ""
    """Hash of the file's bytes; empty when only headers were read."""
    mask_digest: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was found and is not used."""

    path: Path
    reason: str
    unreadable: bool = True
    """Whether something is wrong with it (False: it is simply not needed)."""


@dataclass(slots=True)
class Scan:
    """What the folders of a dataset hold: every picture file is in `pictures` or in `skipped`."""

    pictures: list[Picture] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the user should know, a line each."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a picture file is; `problem` says why it cannot be read."""

    width: int = 0
    height: int = 0
    digest: str = ""
    problem: str = ""


def scan(dataset: DatasetConfig, index: Index, *, bodies: bool = True, progress: Progress | None = None) -> Scan:
    """Look through the folders of a dataset.

    `bodies`: decode every picture once, so that damaged ones are known now, and hash it; False: read headers alone.
    What is known of a file that has not changed is taken from `index`, without opening it.
    Raises UserError for folders that are missing or empty, all at once.
    """
    found = [_listing(subset) for subset in dataset.subsets]
    if wrong := [f for f in found if isinstance(f, str)]:
        raise UserError(*wrong)
    listings = [f for f in found if not isinstance(f, str)]
    masks = [_masks(subset, paths) for subset, (paths, _) in zip(dataset.subsets, listings, strict=True)]
    wanted = [p for paths, _ in listings for p in paths] + [m for of in masks for m in of.values()]
    facts = examine(wanted, index, bodies=bodies, progress=progress)
    result = Scan()
    for i, subset in enumerate(dataset.subsets):
        paths, others = listings[i]
        result.notes += others
        _add_subset(result, i, subset, paths, masks[i], facts)
    return result


def examine(paths: Sequence[Path], index: Index, *, bodies: bool, progress: Progress | None = None) -> dict[Path, Facts]:
    """What each picture file is, from the index where the file has not changed since (size and times), else from the file."""
    paths = list(dict.fromkeys(paths))
    known = index.read("picture", [str(p.absolute()) for p in paths])
    facts: dict[Path, Facts] = {}
    for path in paths:
        row = known.get(str(path.absolute()))
        if row and row["stamp"] == _stamp(path) and (row["digest"] or not bodies):
            facts[path] = Facts(row["width"], row["height"], row["digest"])
    todo = [p for p in paths if p not in facts]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In portions, so that a run that is killed here has kept most of what it learnt.
        for start in range(0, len(todo), 256):
            portion = todo[start : start + 256]
            stamps = {p: _stamp(p) for p in portion}
            fresh = dict(zip(portion, pool.map(lambda p: _examine(p, bodies), portion), strict=True))
            facts |= fresh
            # A problem is not remembered: it may be mended without touching the file (a plug-in that was missing).
            rows = {str(p.absolute()): _row(f, stamps[p]) for p, f in fresh.items() if not f.problem}
            index.write("picture", rows)
            if progress:
                progress(start + len(portion), len(todo))
    return facts


def _row(facts: Facts, stamp: list[int]) -> dict[str, object]:
    return {"stamp": stamp, "width": facts.width, "height": facts.height, "digest": facts.digest}


def _stamp(path: Path) -> list[int]:
    """Changes whenever the file does; ctime too, as a copied file may keep the old one's mtime."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _examine(path: Path, bodies: bool) -> Facts:
    try:
        if not bodies:
            return Facts(*oriented_size(path))
        data = path.read_bytes()
        image = read(BytesIO(data), path.suffix)
        return Facts(image.width, image.height, blake2b(data, digest_size=20).hexdigest())
    except (Unreadable, OSError) as error:
        return Facts(problem=str(error))


def _listing(subset: SubsetConfig) -> tuple[list[Path], list[str]] | str:
    """(pictures in the order of their names, notes about other files), or what is wrong."""
    folder = Path(subset.image_dir)
    if not subset.image_dir or not folder.is_dir():
        return f"image_dir {subset.image_dir!r}: there is no such folder"
    inside = folder.rglob("*") if subset.recursive else folder.iterdir()
    # Names that begin with a dot are other systems' droppings (`._a.png`), not pictures.
    names = sorted((p for p in inside if not p.name.startswith(".") and p.is_file()), key=lambda p: p.relative_to(folder).as_posix())
    pictures = [p for p in names if p.suffix.lower() in SUFFIXES]
    others = Counter(p.suffix.lower() or "(no ending)" for p in names if p.suffix.lower() not in SUFFIXES)
    said = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common())
    if not pictures:
        only = f"; only {said}" if said else ""
        hint = "" if subset.recursive else "; `recursive = true` looks into sub-folders"
        return f"image_dir {subset.image_dir}: no pictures in this folder ({', '.join(SUFFIXES)}){only}{hint}"
    unknown = {s: n for s, n in others.items() if s not in _EXPECTED and s != _suffix(subset)}
    note = f"{folder}: not pictures, left alone: " + ", ".join(f"{n} {s}" for s, n in unknown.items())
    return pictures, [note] if unknown else []


_EXPECTED = (".txt", ".caption", ".json", ".jsonl", ".npz", ".safetensors", ".toml", ".md")


def _suffix(subset: SubsetConfig) -> str:
    ending = subset.caption_extension
    return ending if ending.startswith(".") else f".{ending}"


def _masks(subset: SubsetConfig, paths: Sequence[Path]) -> dict[Path, Path]:
    """Mask picture of each picture that has one: the same relative name, with any picture ending."""
    if not subset.conditioning_data_dir:
        return {}
    folder, root = Path(subset.conditioning_data_dir), Path(subset.image_dir)
    if not folder.is_dir():
        raise UserError(f"conditioning_data_dir {subset.conditioning_data_dir!r}: there is no such folder")
    inside = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    by_stem = {p.relative_to(folder).with_suffix("").as_posix(): p for p in inside}
    stems = {p: p.relative_to(root).with_suffix("").as_posix() for p in paths}
    return {p: by_stem[stem] for p, stem in stems.items() if stem in by_stem}


def _add_subset(
    result: Scan, number: int, subset: SubsetConfig, paths: Sequence[Path], masks: dict[Path, Path], facts: dict[Path, Facts]
) -> None:
    bare, long = [], []
    for path in paths:
        mask = masks.get(path)
        captions = _captions(path, subset)
        if reason := _problem(subset, facts[path], mask, facts, captions):
            result.skipped.append(Skipped(path, reason))
            continue
        if subset.num_repeats < 1:
            result.skipped.append(Skipped(path, f"num_repeats is {subset.num_repeats}", unreadable=False))
            continue
        assert not isinstance(captions, str)
        lines = captions if captions is not None else (subset.class_tokens or "",)
        bare += [path] if captions is None and not subset.class_tokens else []
        long += [path] if len(lines) > 1 and not subset.enable_wildcard else []
        result.pictures.append(
            Picture(
                path=path,
                name=path.relative_to(subset.image_dir).as_posix(),
                width=facts[path].width,
                height=facts[path].height,
                captions=lines,
                subset=number,
                is_reg=subset.is_reg,
                repeats=subset.num_repeats,
                mask_path=mask,
                digest=facts[path].digest,
                mask_digest=facts[mask].digest if mask else "",
            )
        )
    result.notes += _caption_notes(subset, bare, long)


def _problem(
    subset: SubsetConfig, picture: Facts, mask: Path | None, facts: dict[Path, Facts], captions: tuple[str, ...] | str | None
) -> str:
    """Why a picture cannot be used, or nothing."""
    if picture.problem:
        return picture.problem
    if isinstance(captions, str):
        return captions
    if subset.conditioning_data_dir:
        if mask is None:
            return f"no mask picture of this name in conditioning_data_dir {subset.conditioning_data_dir}"
        of_mask = facts[mask]
        if of_mask.problem:
            return f"its mask {mask}: {of_mask.problem}"
        # Masks may be smaller or larger than their pictures, to a pixel's rounding, but not of another shape.
        if abs(of_mask.width * picture.height - of_mask.height * picture.width) > max(
            picture.width, picture.height, of_mask.width, of_mask.height
        ):
            return f"its mask {mask} is {of_mask.width}x{of_mask.height}: not the shape of the picture, {picture.width}x{picture.height}"
    return ""


def _captions(path: Path, subset: SubsetConfig) -> tuple[str, ...] | str | None:
    """The lines of a picture's caption file, None when there is no file, or a string that says what is wrong with it."""
    file = path.with_suffix(_suffix(subset))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        return f"its caption {file} is not UTF-8 text: save it as UTF-8"
    except OSError as error:
        return f"its caption {file}: {error.strerror}"
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)


def _caption_notes(subset: SubsetConfig, bare: Sequence[Path], long: Sequence[Path]) -> list[str]:
    notes = []
    if bare:
        other = next((s for s in (".txt", ".caption") if s != _suffix(subset) and bare[0].with_suffix(s).exists()), None)
        hint = f"; there are {other} files: set caption_extension" if other else ""
        notes.append(
            f"{subset.image_dir}: {len(bare)} pictures have neither a {_suffix(subset)} caption nor class_tokens and train with an empty "
            f"caption ({_some(bare)}){hint}"
        )
    if long:
        many = f"{subset.image_dir}: {len(long)} captions have several lines"
        notes.append(f"{many} and only the first is used ({_some(long)}); enable_wildcard draws one")
    return notes


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(p.name for p in paths[:5]) + (" ..." if len(paths) > 5 else "")


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB, or RGBA where it has transparency, upright. Raises UserError naming the file."""
    try:
        return read(path, path.suffix)
    except (Unreadable, OSError) as error:
        raise UserError(f"{path}: {error}") from error
