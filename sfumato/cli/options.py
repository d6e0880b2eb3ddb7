"""Every setting there is, read off the config dataclasses and the families' `Options`: name, type, default, help."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from sfumato import adapters, families
from sfumato.adapters.arguments import CommonArgs
from sfumato.config import Config, rules


@dataclass(frozen=True, slots=True)
class Option:
    """One field of one config record: one flag, one TOML key."""

    name: str
    section: str
    """Field of `Config` ("data", "optimizer" ...), or the family's name."""
    kind: Any
    """The field's type."""
    hint: Any
    """The same with the rules that stand with it."""
    default: object
    help: str


@cache
def sections() -> dict[str, type]:
    """The records of `Config`, by field name, without the family's."""
    hints = get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config) if f.name != "family"}


@cache
def common() -> dict[str, Option]:
    """The settings of every family, by name."""
    return {o.name: o for section, record in sections().items() for o in of(record, section).values()}


@cache
def of_family(family: str) -> dict[str, Option]:
    """The settings that only this family has, by name. Imports no torch."""
    return of(families.facts(family).options, family)


@cache
def owners() -> dict[str, tuple[str, ...]]:
    """Setting -> the families that have it as their own."""
    found: dict[str, tuple[str, ...]] = {}
    for family in families.names():
        for name in of_family(family):
            found[name] = (*found.get(name, ()), family)
    return found


@cache
def known() -> Mapping[str, Option]:
    """All settings, those of all families included."""
    return {**common(), **{name: _shared(name, having) for name, having in owners().items() if name not in common()}}


def _shared(name: str, having: tuple[str, ...]) -> Option:
    """An option of several families: its help says what each of them says."""
    options = {family: of_family(family)[name] for family in having}
    first, texts = options[having[0]], list(dict.fromkeys(option.help for option in options.values()))
    if len(texts) > 1:
        having_it = [", ".join(name for name, option in options.items() if option.help == text) for text in texts]
        texts = [f"{names}: {text}" for names, text in zip(having_it, texts, strict=True)]
    default = first.default if all(option.default == first.default for option in options.values()) else None
    kind = first.kind if all(option.kind == first.kind for option in options.values()) else str | None
    return replace(first, kind=kind, default=default, help=" ".join(texts))


def of(record: type, section: str) -> dict[str, Option]:
    """A dataclass's fields as options, in order."""
    kinds, hints, texts = get_type_hints(record), rules.hints(record), help_texts(record)
    return {
        f.name: Option(f.name, section, kinds[f.name], hints[f.name], _default(f), _filled(texts.get(f.name, "")))
        for f in fields(record)
    }


def _filled(text: str) -> str:
    """A help text with what is found, not listed."""
    args = ", ".join(f.name for f in fields(CommonArgs))
    return text.replace("{kinds}", ", ".join(adapters.kinds())).replace("{arguments}", args)


def _default(field: Any) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def help_texts(record: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(record.__mro__):
        texts |= _module_texts(base.__module__).get(base.__name__, {})
    return texts


@cache
def _module_texts(module: str) -> dict[str, dict[str, str]]:
    """class -> field -> the string under it, from a module's source."""
    path = getattr(sys.modules[module], "__file__", None)
    if path is None:
        return {}
    classes = [n for n in ast.parse(Path(path).read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)]
    return {c.name: dict(pair for pair in map(_documented, c.body, c.body[1:]) if pair) for c in classes}


def _documented(field: ast.stmt, text: ast.stmt) -> tuple[str, str] | None:
    if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
        return None
    if not (isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)):
        return None
    return field.target.id, " ".join(text.value.value.split())
