"""Floor 4: one folder per family, found by its name; a new family adds no line here.

`facts.py` of a family imports no torch and holds the record `FACTS`: its options and how its files are recognised.
`family.py` holds the record `FAMILY`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from sfumato.config import FamilyOptions
    from sfumato.models.base import Family
    from sfumato.models.facts import Facts


@cache
def names() -> tuple[str, ...]:
    """All families' names."""
    return tuple(sorted(p.parent.name for p in Path(__file__).parent.glob("*/facts.py")))


def facts(name: str) -> Facts:
    """What is known of a family before torch is imported."""
    return cast("Facts", import_module(f"sfumato.families.{name}.facts").FACTS)


def family(name: str) -> Family:
    """A family's record."""
    return cast("Family", import_module(f"sfumato.families.{name}.family").FAMILY)


def of(options: FamilyOptions) -> Family:
    """The family whose `Options` these are."""
    return family(options.family)


def facts_of(options: FamilyOptions) -> Facts:
    """The facts of the family whose `Options` these are."""
    return facts(options.family)
