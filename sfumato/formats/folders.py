"""A folder of files that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sfumato.errors import UserError, WriteError
from sfumato.formats import leftovers
from sfumato.formats.files import full_disk, is_full, read_header


@contextmanager
def aside_folder(path: Path, needed: int = 0) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well.

    `path` is the old folder or the whole new one; killed between two renames, the old one waits as `.NAME.PID.old` and
    `leftovers.restore` brings it back. Errors: `WriteError` when the disk is full or the folder cannot be written or
    replaced.
    """
    temp, old = leftovers.folder_beside(path, "part"), leftovers.folder_beside(path, "old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if why := irreplaceable(path):
            raise UserError(why)
        leftovers.restore(path.parent, lambda name: name == path.name)
        for left in (temp, old):
            shutil.rmtree(left, ignore_errors=True)
        temp.mkdir()
        yield temp
        if path.exists():
            os.replace(path, old)
        os.replace(temp, path)
    except BaseException as error:
        if old.exists() and not path.exists():
            with suppress(OSError):
                os.replace(old, path)
        shutil.rmtree(temp, ignore_errors=True)
        if isinstance(error, Exception) and is_full(error):
            raise WriteError(full_disk(path, needed)) from error
        if isinstance(error, OSError):
            raise WriteError(f"{path}: could not be written: {error.strerror or error}") from error
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def irreplaceable(path: Path) -> str:
    """Why a new folder may not take the place of `path`: only one that sfumato wrote is replaced; nothing when it
    may."""
    if not os.path.lexists(path):
        return ""
    if path.is_symlink() or not path.is_dir():
        return f"{path}: a folder is to be written here, and this is a file; remove it or choose another output_name"
    ours = leftovers.made_here(path) and ((path / "manifest.json").is_file() or _model(path))
    if ours or not os.listdir(path):
        return ""
    return (
        f"{path}: a folder is to be written here, and this one is not sfumato's; move it away or choose another "
        "output_name"
    )


def _model(folder: Path) -> bool:
    """Whether a diffusers folder was written by sfumato, as its weights say."""
    for weights in sorted(folder.glob("*/*.safetensors")):
        with suppress(UserError, OSError):
            if read_header(weights).metadata.get("modelspec.implementation", "").startswith("sfumato"):
                return True
    return False
