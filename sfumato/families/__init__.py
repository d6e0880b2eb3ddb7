"""Floor 3: one folder a family, found by its name; a new family adds no line here.

`facts.py` of a family imports no torch: its options and how its files are recognised.
`family.py` holds the record `FAMILY`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from sfumato.families.base import Family


@cache
def names() -> tuple[str, ...]:
    """All families' names."""
    return tuple(sorted(p.parent.name for p in Path(__file__).parent.glob("*/facts.py")))


def facts(name: str) -> ModuleType:
    """A family's `facts.py`: `Options`, `detect`, `ARCHITECTURES`; imports no torch."""
    return import_module(f"sfumato.families.{name}.facts")


def family(name: str) -> Family:
    """A family's record."""
    return cast("Family", import_module(f"sfumato.families.{name}.family").FAMILY)


def of(options: object) -> Family:
    """The family whose `Options` these are."""
    return family(type(options).__module__.split(".")[2])
