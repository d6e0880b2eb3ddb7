"""What goes wrong beside the training itself (a log line, a sample image, an old file): reported once, and the training
goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sfumato.train.progress import console


@dataclass(slots=True)
class Mishaps:
    """Those of a run, each reported once."""

    reported: set[str] = field(default_factory=set)

    @contextmanager
    def survived(self, what: str, kind: type[Exception] = Exception) -> Iterator[None]:
        """Errors of this kind end the block, not the run. `what`: what was not done, for the message."""
        try:
            yield
        except kind as error:
            self.report(what, error)

    def report(self, what: str, error: Exception) -> None:
        """Print it, unless the same was printed before."""
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        message = f"{what}: {why}; training goes on"
        if message not in self.reported:
            self.reported.add(message)
            console.print(message)
