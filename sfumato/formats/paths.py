"""Paths as users have them: a name as text that can be printed and stored, and what stands there, found without opening
it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_NOT_TEXT = re.compile("[\ud800-\udfff]")
_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def printable(path: str | os.PathLike[str]) -> str:
    """A path's text with `\\xff` for each byte that is not UTF-8: Python's own marks for them can be neither printed
    nor stored."""
    if (text := os.fspath(path)).isascii():
        return text
    return _NOT_TEXT.sub(lambda found: _spelt(ord(found[0])), text)


def _spelt(mark: int) -> str:
    return f"\\x{mark - 0xDC00:02x}" if 0xDC80 <= mark <= 0xDCFF else f"\\u{mark:04x}"


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8."""
    return not _NOT_TEXT.search(value)


def absolute(path: str | os.PathLike[str]) -> str:
    """A path's text from the root on, as `Path.absolute` gives it, in a fraction of its time."""
    text = os.fspath(path)
    return text if text.startswith("/") and os.sep == "/" else str(Path(text).absolute())


def kind(mode: int) -> str:
    """What a file's mode says that it is: "file", "folder", "pipe", "socket" or "device"."""
    return next((name for test, name in _KINDS if test(mode)), "file")


def trouble(path: str | os.PathLike[str], expected: str = "file") -> str:
    """Why there is no `expected` ("file", "folder" or "file or folder") at a path; empty when there is one.

    Nothing is opened: a pipe would be waited for.
    """
    try:
        found = kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return "is a link to nothing" if os.path.islink(path) else "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError:  # a zero byte, or a character that this system has no byte for
        return "is not a possible path here"
    return "" if found in expected.split(" or ") else f"is a {found}, not a {expected}"
