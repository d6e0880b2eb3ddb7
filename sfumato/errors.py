"""A user's mistake, reported once and clearly; the command line prints it without a traceback and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from types import TracebackType


class UserError(Exception):
    """One or several things that the user can fix.

    Each message names the file, key or flag, what was expected, and what to do.
    """

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class Mistakes:
    """Gathers what several checks find, so that a user gets all of it at once.

    `with mistakes: ...` runs a check; the `UserError` that it raises is noted, and the next check goes on.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def __enter__(self) -> Mistakes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, UserError):
            self.messages += error.messages
        return isinstance(error, UserError)

    def raise_all(self) -> None:
        """Errors: one `UserError` with all that was found."""
        if self.messages:
            raise UserError(*dict.fromkeys(self.messages))


class WriteError(UserError):
    """Something could not be written, for a reason outside the run: the disk is full, a folder is read-only."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a mistyped name, or nothing when none is near."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
