"""A user's mistake, told once and clearly; the command line prints it without a traceback and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """One or several things that the user can mend.

    Each message names the file, key or flag, what was expected, and what to do.
    """

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


def nearest(name: str, known: Iterable[str], count: int = 1) -> str:
    """`; did you mean 'x'?` for a mistyped name, or nothing when none is near."""
    close = get_close_matches(name, list(known), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
