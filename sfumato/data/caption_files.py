"""Captions in files beside their images; those that have not changed since are known without being opened."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato.config import SubsetConfig
from sfumato.data.sources import Captions
from sfumato.data.store import FileIndex
from sfumato.formats.files import stamp_of
from sfumato.formats.paths import absolute, kind


def read_captions(images: Sequence[Path], subset: SubsetConfig, index: FileIndex) -> list[Captions]:
    """The captions of each image, from the index where its file has not changed since, else from the file."""
    began = time.time_ns()
    suffix = ending(subset)
    files = [_caption_file(str(image), suffix) for image in images]
    names = [absolute(file) if file else "" for file, _ in files]
    known = index.read("caption", names)
    fresh: dict[str, object] = {}
    found: list[Captions] = []
    for name, (file, status) in zip(names, files, strict=True):
        if not isinstance(status, os.stat_result):
            found.append(status)
            continue
        now = stamp_of(status)
        lines: Captions = _remembered_lines(known.get(name), now)
        if lines is None:
            lines = _lines(file, status)
            # A file that was written just now may be written again within the same tick of its clock.
            if isinstance(lines, tuple) and max(now[1:3]) < began - SETTLED:
                fresh[name] = [now, lines]
        found.append(lines)
    index.write("caption", fresh)
    return found


SETTLED = 2 * 10**9
"""Nanoseconds after which a change of a file shows in its time of writing: that of some file systems is as coarse."""


def _remembered_lines(row: Any, now: list[int]) -> tuple[str, ...] | None:
    """What the index knows of a caption file that has not changed; None when it has, or when the row is damaged."""
    if not isinstance(row, list) or len(row) != 2 or row[0] != now or not isinstance(row[1], list):
        return None
    return tuple(row[1]) if row[1] and all(isinstance(line, str) for line in row[1]) else None


def _caption_file(image: str, suffix: str) -> tuple[str, os.stat_result | str | None]:
    """An image's caption file as it stands, nothing where there is none, or a string: what is wrong with it."""
    for file in _candidates(image, suffix):
        try:
            return file, os.stat(file)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
                return "", f"its caption {file}: {error.strerror}"
    return "", None


def _candidates(image: str, suffix: str) -> list[str]:
    stem = os.path.splitext(image)[0]
    if stem.count("_") < 4:
        return [stem + suffix]
    folder, name = os.path.split(stem)
    parts = name.rsplit("_", 4)
    return [stem + suffix, os.path.join(folder, parts[0] + suffix)] if len(parts) == 5 else [stem + suffix]


def caption_files(image: Path, subset: SubsetConfig) -> list[Path]:
    """Where an image's caption may stand: `name.txt` serves `name_a_b_c_d.png` too, whose numbers say where a face
    is."""
    return [Path(file) for file in _candidates(str(image), ending(subset))]


def ending(subset: SubsetConfig) -> str:
    """The ending of its caption files, with the dot."""
    given = subset.caption_extension
    return given if given.startswith(".") else f".{given}"


def _lines(file: str, status: os.stat_result) -> tuple[str, ...] | str:
    """A caption file's lines that are not blank, an empty one if there is none; or a string: what is wrong with
    it."""
    if (found := kind(status.st_mode)) != "file":
        return f"its caption {file} is a {found}, not a file"
    if status.st_size > LONGEST_CAPTION:
        return f"its caption {file} is {status.st_size:,} bytes long: more than any text encoder reads"
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return f"its caption {file} is not UTF-8 text: save it as UTF-8"
    except OSError as error:
        return f"its caption {file}: {error.strerror}"
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)


LONGEST_CAPTION = 2**20
"""Bytes of a caption file; more is something else under its name."""
