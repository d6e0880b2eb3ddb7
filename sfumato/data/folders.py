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
    found = Listing()
    for root, _, names in os.walk(folder, onerror=lambda error: found.troubles.append(_unread(error))):
        inside, start = Path(root), os.path.join(root, "")
        for name in names:
            if not name.startswith("."):
                _add(found, inside, start + name, name)
        if not recursive:
            break
    found.images.sort(key=Path.as_posix)  # as by the names inside the folder: all begin with the folder's own
    return found


def _unread(error: OSError) -> tuple[Path, str]:
    return Path(error.filename), f"cannot be read: {error.strerror}"


def _add(found: Listing, inside: Path, text: str, name: str) -> None:
    suffix = os.path.splitext(name)[1].lower().rstrip(".")
    if suffix not in SUFFIXES:
        found.others[suffix or "(no ending)"] += 1
        return
    path, seen = inside / name, None
    try:
        status = os.stat(text)
        seen = stamp_of(status) if stat.S_ISREG(status.st_mode) else None
    except (OSError, ValueError):
        pass  # `trouble` says which
    if seen is None and (reason := trouble(path)):
        found.troubles.append((path, reason))
        return
    found.images.append(path)
    found.stamps[path] = seen or []
