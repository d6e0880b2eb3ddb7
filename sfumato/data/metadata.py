"""Images and captions that a metadata file names (JSON or JSONL, as sd-scripts' tools write them)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.config.data import CaptionOptions
from sfumato.data.batch import Size
from sfumato.data.folders import Listing, listing
from sfumato.errors import UserError
from sfumato.formats.paths import absolute, is_text
from sfumato.formats.text import parse_json, read_text

MOST = 5
"""Mistakes of one kind that are listed."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a metadata file says of an image."""

    caption: str | None = None
    tags: str | None = None
    size: Size | None = None

    def lines(self, options: CaptionOptions) -> tuple[str, ...] | None:
        """The image's captions: each line of the caption with the tags behind it, joined by caption_separator as
        sd-scripts joins them; None where there are neither.

        Where it has no caption line, the tags are the caption: sd-scripts loses them with enable_wildcard. Without
        enable_wildcard the first line is used, with the tags, which sd-scripts joins to the last.
        """
        if self.caption is None and self.tags is None:
            return None
        tags = options.caption_separator.join(_lines(self.tags))
        lines = _lines(self.caption)
        return tuple(f"{line}{options.caption_separator}{tags}" if tags else line for line in lines) or (tags,)


def _lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


@dataclass(slots=True)
class Described:
    """The images that a metadata file names, as they are found on the disk."""

    listing: Listing = field(default_factory=Listing)
    records: dict[Path, Record] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)
    """Images of the folder that the file does not name."""


def describe(metadata_file: str, image_dir: str, *, recursive: bool = False) -> Described:
    """Find the images of a metadata file: its keys are absolute, or relative to `image_dir`, with or without an
    image's ending.

    What is not there, or stands there twice, is among the troubles of `listing`. `recursive`: images of sub-folders
    that the file does not name are told too. Errors: `UserError` for a file that cannot be read as metadata, or whose
    folder is not told.
    """
    folders = _Folders(image_dir)
    inside = folders.listing(os.path.normpath(image_dir), recursive=recursive) if image_dir else Listing()
    found = Described(Listing(others=inside.others))
    records = read(metadata_file)
    relative = next((key for key in records if not os.path.isabs(key)), None)
    if relative is not None and not image_dir:
        raise UserError(
            f"{metadata_file}: names images relative to a folder ({relative!r} ...): set image_dir, or beside in_json "
            "train_data_dir, to that folder"
        )
    for key, record in records.items():
        path, problem = folders.find(key)
        if not problem and path in found.records:
            problem = "{file} names it twice"
        if problem:
            found.listing.troubles.append((path, problem.replace("{file}", metadata_file)))
        else:
            found.records[path] = record
    found.listing.images = sorted(found.records, key=Path.as_posix)
    found.listing.stamps = {path: stamp for path, stamp in folders.stamps.items() if path in found.records}
    found.others = [path for path in inside.images if path not in found.records]
    return found


class _Folders:
    """Folders of images, each listed once."""

    def __init__(self, image_dir: str) -> None:
        self.image_dir = image_dir
        whole = (absolute(os.path.normpath(image_dir)), os.path.realpath(image_dir)) if image_dir else ()
        self._spelt = tuple(os.path.join(folder, "") for folder in whole)
        """The folder as the names of images may begin with it."""
        self.stamps: dict[Path, list[int]] = {}
        self._names: dict[str, dict[str, Path]] = {}
        self._stems: dict[str, dict[str, list[Path]]] = {}

    def listing(self, folder: str, *, recursive: bool = False) -> Listing:
        """What lies in a folder, of a normal path, whose images `look` then knows."""
        found = listing(Path(folder), recursive=recursive)
        self.stamps |= found.stamps
        names, stems = self._names.setdefault(folder, {}), self._stems.setdefault(folder, {})
        for image in found.images:
            if not recursive or str(image.parent) == folder:
                names[image.name] = image
                stems.setdefault(os.path.splitext(image.name)[0], []).append(image)
        return found

    def look(self, folder: str, name: str) -> list[Path]:
        """The images of exactly this name, or else of this name with any image's ending."""
        if folder not in self._names:
            self.listing(folder)
        image = self._names[folder].get(name)
        return [image] if image else self._stems[folder].get(name, [])

    def find(self, key: str) -> tuple[Path, str]:
        """The image that a key names, or why there is none."""
        place = self._place(key)
        found = [] if "\0" in place else self.look(*os.path.split(place))
        if len(found) > 1:
            means = ", ".join(p.name for p in found)
            return Path(place), f"{{file}} means several images by this: {means}; write the ending"
        return (found[0], "") if found else (Path(place), "is named in {file}, and there is no such image")

    def _place(self, key: str) -> str:
        """Where a key says that its image is: inside image_dir, if it is there, however that is spelt."""
        if not os.path.isabs(key):
            # Backslashes are those of a file that was written under Windows.
            return os.path.normpath(os.path.join(self.image_dir, key.replace("\\", "/")))
        place = os.path.normpath(key)
        spelt = next((folder for folder in self._spelt if place.startswith(folder)), None)
        return os.path.normpath(os.path.join(self.image_dir, place.removeprefix(spelt))) if spelt else place


def read(path: str) -> dict[str, Record]:
    """What a metadata file says, by key: an object of objects, or with the ending `.jsonl` one object in each line,
    with its key as `image_path`. Errors: `UserError`, with every mistake."""
    text = read_text(path)
    pairs = _of_lines(path, text) if path.lower().endswith(".jsonl") else _of_object(path, text)
    records: dict[str, Record] = {}
    wrong: list[str] = []
    for where, key, content in pairs:
        try:
            if key in records:
                raise ValueError(f"{key!r} stands there twice")
            records[key] = _record(content)
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        raise UserError(*wrong[:MOST], *([f"{path}: and {len(wrong) - MOST} more"] if len(wrong) > MOST else []))
    if not records:
        raise UserError(f"{path}: names no image")
    return records


def _of_object(path: str, text: str) -> Iterator[tuple[str, str, Any]]:
    content = parse_json(path, text)
    if not isinstance(content, dict):
        raise UserError(
            f'{path}: expected an object {{"image": {{"caption": ..., "tags": ...}}}}, found a '
            f"{type(content).__name__}; a file of one object in each line has the ending .jsonl"
        )
    for key, record in content.items():
        yield f"{path}: {key!r}", key, record


def _of_lines(path: str, text: str) -> Iterator[tuple[str, str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: is not JSON: {error}") from None
        key = content.get("image_path") if isinstance(content, dict) else None
        if not isinstance(key, str) or not key:
            raise UserError(f'{path}:{number}: expected an object with "image_path"')
        yield f"{path}:{number}", key, content


def _record(content: Any) -> Record:
    """Errors: `ValueError`."""
    if not isinstance(content, Mapping):
        raise ValueError(f"expected an object, found {content!r:.80}")
    texts = {}
    for name in ("caption", "tags"):
        texts[name] = content.get(name)
        if texts[name] is not None and not isinstance(texts[name], str):
            raise ValueError(f"{name}: expected text, found {texts[name]!r:.80}")
        if not is_text(texts[name] or ""):
            raise ValueError(f"{name}: expected text, found half of a character: {texts[name]!r:.80}")
    size = content.get("image_size")
    if size is None and {"width", "height"} <= content.keys():
        size = [content["width"], content["height"]]
    if size is not None and not _is_size(size):
        raise ValueError(f"image_size: expected [width, height], found {size!r:.80}")
    return Record(texts["caption"], texts["tags"], (size[0], size[1]) if size else None)


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def notes(found: Described, metadata_file: str, sizes: Iterable[tuple[Path, Size]]) -> list[str]:
    """What the user should know: images that the file does not name, and those of another size than it says.

    `sizes`: of the images, which count.
    """
    said = []
    if found.others:
        said.append(
            f"{metadata_file}: {len(found.others)} images of the folder are not named in it and are left out "
            f"({_some(found.others)})"
        )
    other = [path for path, size in sizes if (told := found.records[path].size) and set(told) != set(size)]
    if other:
        what = f"{len(other)} images are not of the size that it says ({_some(other)})"
        said.append(f"{metadata_file}: {what}: the files' own sizes count")
    return said


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(p.name for p in paths[:MOST]) + (" ..." if len(paths) > MOST else "")
