"""What goes wrong beside the training itself (a log line, a sample image, an old file): told once, and the training
goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sfumato.train.progress import console


@dataclass(slots=True)
class Mishaps:
    """Those of a run."""

    told: set[str] = field(default_factory=set)

    @contextmanager
    def survived(self, what: str, kind: type[Exception] = Exception) -> Iterator[None]:
        """Errors of this kind end the block, not the run. `what`: what was not done, for the message."""
        try:
            yield
        except kind as error:
            self.tell(what, error)

    def tell(self, what: str, error: Exception) -> None:
        """Say it, unless the same was said before."""
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        message = f"{what}: {why}; training goes on"
        if message not in self.told:
            self.told.add(message)
            console.print(message)
