"""Everything that is wrong or worth saying about what a user wrote, gathered so that it comes at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sfumato.errors import UserError


@dataclass(frozen=True, slots=True)
class Given:
    """One setting as a user wrote it."""

    key: str
    value: object
    where: str
    """"run.toml:12", or "" on the command line."""
    flag: bool
    """From the command line: the value is a string, a list of strings, or True."""
    lenient: bool = False
    """From a kohya command or file: where it has no effect this is stated, not refused."""
    source: Path | None = None
    """The file that it stands in."""

    def __str__(self) -> str:
        flag = f"--{self.key}"
        return flag if self.where in ("", flag) else f"{self.where}: {self.key}"


@dataclass(slots=True)
class Report:
    """Errors and notices, in the order in which they were found."""

    errors: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    idle: set[str] = field(default_factory=set)
    """Settings that were stated to have no effect; they go back to their defaults."""

    def error(self, message: str) -> None:
        if message not in self.errors:
            self.errors.append(message)

    def note(self, message: str) -> None:
        if message not in self.notices:
            self.notices.append(message)

    def without_effect(self, given: Given, why: str) -> None:
        """Refuse a setting that does nothing, or state it when it comes from a kohya command or file."""
        if given.lenient:
            self.idle.add(given.key)
            self.note(f"{given}: accepted, no effect: {why}")
        else:
            self.error(f"{given}: would have no effect: {why}; leave it out")

    def finish(self) -> None:
        """Raises UserError with all errors, if there are any."""
        if self.errors:
            raise UserError(*self.errors)
