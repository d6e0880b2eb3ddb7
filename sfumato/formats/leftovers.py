"""What killed processes left half-written: known by name and content, never taken from a process that lives or from a
user."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

STALE = 600
"""Seconds untouched after which a file of a dead process is removed while others may write beside it: a process of
another machine or container may live although its number means nothing here."""
KINDS = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Endings of what sfumato writes into folders; a folder that holds anything else is not removed."""
_DESKTOP = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers put into every folder
MARKS = ("manifest.json", "model_index.json", "modular_model_index.json")
"""A whole folder of sfumato's holds one of these: a run's state, a model."""
_FILE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,9})-\d+\.part(\.\w+)?")
_FOLDER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,9})\.(?P<kind>part|old)")
_counter = itertools.count()


def file_beside(path: Path) -> Path:
    """Where a file is written before it becomes `path`. The ending stays: some writers choose the format by it."""
    return path.with_name(f".{path.stem}.{os.getpid()}-{next(_counter)}.part{path.suffix}")


def folder_beside(path: Path, kind: Literal["part", "old"]) -> Path:
    """Where a folder is written before it becomes `path`, or where the old one waits until the new one stands."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


@dataclass(frozen=True, slots=True)
class Leftover:
    """An unfinished file or folder, or an old folder whose successor may not have come."""

    path: Path
    name: str
    """What it was to become: a file's name without its ending, a folder's whole name."""
    kind: Literal["file", "part", "old"]


def found(parent: Path, fits: Callable[[str], object], age: float = 0) -> Iterator[Leftover]:
    """Leftovers of dead processes whose names fit, untouched for `age` seconds; a folder that cannot be read has
    none."""
    entries: list[tuple[Path, os.stat_result]] = []
    try:
        with os.scandir(parent) as listing:
            for entry in listing:
                if entry.name.startswith("."):
                    with suppress(FileNotFoundError):  # another process has just removed it
                        entries.append((Path(entry.path), entry.stat(follow_symlinks=False)))
    except OSError:
        return
    for path, facts in entries:
        folder = stat.S_ISDIR(facts.st_mode)
        match = (_FOLDER if folder else _FILE).fullmatch(path.name)
        if not match or not (folder or stat.S_ISREG(facts.st_mode)) or not fits(match["name"]):
            continue
        touched = _touched(path, facts.st_mtime) if folder else facts.st_mtime
        if time.time() - touched >= age and not lives(int(match["pid"]), touched):
            kind: Literal["part", "old"] = "old" if folder and match["kind"] == "old" else "part"
            yield Leftover(path, match["name"], kind if folder else "file")


def restore(parent: Path, fits: Callable[[str], object]) -> list[Path]:
    """Bring back old folders whose successors never came; returns what stands again."""
    back = []
    for left in found(parent, fits):
        target = left.path.with_name(left.name)
        if left.kind == "old" and not os.path.lexists(target) and any((left.path / mark).is_file() for mark in MARKS):
            with suppress(OSError):  # another process may do the same
                os.replace(left.path, target)
                back.append(target)
    return back


def clear(parent: Path, fits: Callable[[str], object], age: float = 0) -> list[Path]:
    """Remove unfinished files and folders, and old folders whose successors stand; returns what old folders came
    back."""
    back = restore(parent, fits)
    for left in found(parent, fits, age):
        if left.kind == "file":
            with suppress(OSError):
                left.path.unlink()
        elif made_here(left.path) and (left.kind == "part" or left.path.with_name(left.name).exists()):
            shutil.rmtree(left.path, ignore_errors=True)
    return back


def exchanging(parent: Path, fits: Callable[[str], object]) -> bool:
    """Whether a process is just putting a new folder of a fitting name in the place of the old one."""
    with suppress(OSError):
        matches = [_FOLDER.fullmatch(name) for name in os.listdir(parent)]
        return any(m and m["kind"] == "old" and fits(m["name"]) and not (parent / m["name"]).exists() for m in matches)
    return False


def clear_file(path: Path) -> None:
    """Remove what processes that were killed while they wrote the file `path` left."""
    for left in found(path.parent, lambda name: name == path.stem, STALE):
        if left.kind == "file":
            with suppress(OSError):
                left.path.unlink()


def made_here(folder: Path) -> bool:
    """Whether a folder holds nothing but kinds of files that sfumato writes into folders."""
    try:
        return all(map(_made_here, list(folder.rglob("*"))))
    except OSError:
        return False  # what cannot be listed may be anything


def _made_here(path: Path) -> bool:
    if path.is_symlink():
        return False
    return path.is_dir() or (path.is_file() and (path.suffix in KINDS or path.name in _DESKTOP))


def lives(pid: int, touched: float) -> bool:
    """Whether the process `pid` that last wrote at `touched` (seconds since 1970) may still run on this machine."""
    import psutil

    if pid == os.getpid():
        # Its own number, but written before it began: another process had the number.
        return bool(touched >= psutil.Process().create_time() - 1)
    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= touched + 1)
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False


def _touched(folder: Path, own: float) -> float:
    """Seconds since 1970 when a folder, touched itself at `own`, or anything in it was last written."""
    latest = own
    with suppress(OSError):
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):  # a process that lives is just writing in it
                latest = max(latest, path.lstat().st_mtime)
    return latest
