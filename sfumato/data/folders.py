"""What lies in a folder of images, by names and kinds of files; nothing is opened, and torch is not imported."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sfumato.formats.files import stamp_of
from sfumato.formats.paths import trouble

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl", ".heic", ".heif")
"""Endings of images; in capitals too."""
_SUFFIXES = frozenset(SUFFIXES)


@dataclass(slots=True)
class Listing:
    """The files of a folder."""

    images: list[Path] = field(default_factory=list)
    """Files with an image's ending, in the order of their names."""
    stamps: dict[Path, list[int]] = field(default_factory=dict)
    """The stamp of each, as it was found."""
    others: Counter[str] = field(default_factory=Counter)
    """Ending, in small letters -> how many other files have it."""
    troubles: list[tuple[Path, str]] = field(default_factory=list)
    """What has an image's ending and is not a file, and sub-folders that cannot be read; with the reason."""


def listing(folder: Path, *, recursive: bool = False) -> Listing:
    """What lies in a folder. Names that begin with a dot are left by other systems (`._a.png`), not images."""
    found, rows = Listing(), list[tuple[str, Path, list[int]]]()
    for root, _, names in os.walk(folder, onerror=lambda error: found.troubles.append(_unread(error))):
        inside, start = Path(root), os.path.join(root, "")
        for name in names:
            if name.startswith("."):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in _SUFFIXES:
                found.others[suffix.rstrip(".") or "(no ending)"] += 1
            elif seen := _look(found, path := inside / name, start + name):
                rows.append((start + name, path, seen))
        if not recursive:
            break
    # In the order of the names inside the folder: all begin with the folder's own.
    rows.sort(key=lambda row: row[0].replace(os.sep, "/"))
    found.images = [path for _, path, _ in rows]
    found.stamps = {path: seen for _, path, seen in rows}
    return found


def _unread(error: OSError) -> tuple[Path, str]:
    return Path(error.filename), f"cannot be read: {error.strerror}"


def _look(found: Listing, path: Path, text: str) -> list[int]:
    """The stamp of a file; nothing, and a line among the troubles, where there is none."""
    try:
        status = os.stat(text)
        if stat.S_ISREG(status.st_mode):
            return stamp_of(status)
    except (OSError, ValueError):
        pass  # `trouble` says which
    found.troubles.append((path, trouble(path) or "could not be read just now"))
    return []
