"""One run at a time writes results of one name into one folder: the second is refused.

The lock is the operating system's, on a hidden file beside the results: it ends with the process, however that ends,
and holds for every process that sees the folder, other containers' too. The file goes when the run ends; after a kill,
with the next run of the name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.formats import leftovers
from sfumato.train.progress import console


@contextmanager
def alone(folder: Path, name: str, *, main: bool = True) -> Iterator[None]:
    """No other run writes results called `name` into `folder` while this lasts; what a killed one left is cleared away
    first.

    `main`: whether this is the process of its run that writes. Errors: `UserError` when another run does.
    """
    if not main:
        yield
        return
    made = _make(folder)
    lock = _acquired(folder, name)
    try:
        _clear(folder, name, sure=lock is not None)
        yield
    finally:
        if lock:
            _release(lock)
        for parent in made:
            with suppress(OSError):  # something was written into it
                parent.rmdir()


def taken(config: Config) -> str:
    """A message that another run writes what this config asks for, just now; empty when none does."""
    folder, name = Path(config.output.output_dir), config.output.output_name
    path = _path(folder, name)
    if not path.exists():
        return ""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _taken(folder, name)
    except (OSError, NotImplementedError):
        return ""
    _release(lock)
    return ""


def _taken(folder: Path, name: str) -> str:
    who = "a process of unknown number"
    with suppress(OSError, ValueError):
        who = f"process {int(_path(folder, name).read_text(encoding='ascii'))}"
    return (
        f"output_name: another run ({who}) writes {name!r} into {folder} just now; wait for it, or choose another "
        "output_name"
    )


def _path(folder: Path, name: str) -> Path:
    return folder / f".{name}.lock"


def _acquired(folder: Path, name: str) -> BaseFileLock | None:
    """None: locks do not work here."""
    path = _path(folder, name)
    for _ in range(3):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(_taken(folder, name)) from None
        except (OSError, NotImplementedError) as error:
            if folder.is_dir():
                console.print(f"{folder}: no lock can be had here ({error}); start no other run that writes {name!r}")
            return None
        try:
            with path.open("r+", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")
                file.truncate()
            return lock
        except FileNotFoundError:
            lock.release()  # the run before removed it between our opening and locking it
        except OSError:
            return lock  # Windows does not let a locked file be written through another handle
    return None


def _release(lock: BaseFileLock) -> None:
    path = Path(lock.lock_file)
    if os.name != "nt":  # while it is locked, so that nobody else has just locked it
        path.unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):
        if os.name == "nt":  # which refuses when it is open
            path.unlink(missing_ok=True)


def _make(folder: Path) -> list[Path]:
    """Make the folder; returns what had to be made, the innermost first."""
    missing = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    with suppress(OSError):  # what is wrong with it is reported with all other mistakes
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _clear(folder: Path, name: str, *, sure: bool) -> None:
    """Clear away what killed runs of this name left. Without a lock, others may be at it."""
    age = 0.0 if sure else leftovers.STALE
    ours = re.compile(re.escape(name) + r"(-\d{6}|-step\d{8})?(-state|-loss|_\w+)?")
    for path in leftovers.clear(folder, ours.fullmatch, age):
        console.print(f"{path}: brought back; the run that was replacing it was killed")
    leftovers.clear(folder / "sample", lambda found: found.startswith(f"{name}_"), age)
