"""What a run prints along the way may go into a file on a full disk."""

from __future__ import annotations

import errno
import io

import pytest

from sfumato.train.progress import Bar, console


class Full(io.StringIO):
    """A file on a disk that is full until there is room."""

    room = False

    def write(self, text: str) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_lines_that_cannot_be_written_end_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Full()
    monkeypatch.setattr("sys.stderr", disk)
    console.print("lost")
    bar = Bar("training", 10)
    bar.spoke = 0.0
    bar.to(5)
    disk.room = True
    console.print("found")
    assert disk.getvalue() == "found\n"
