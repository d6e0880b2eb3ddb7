"""network_args as they are written: names, types and values of the fields of a dataclass. Imports no torch."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import fields
from typing import Any, get_args, get_type_hints

Patterns = tuple[re.Pattern[str], ...]


def types(record: type) -> dict[str, str]:
    """Argument of a dataclass -> the name of its type, which may also be None."""
    hints = get_type_hints(record)
    found = {f.name: next(iter(get_args(hints[f.name])), hints[f.name]) for f in fields(record)}
    return {
        name: kind.__name__
        for name, kind in found.items()
        if name not in ("rank", "alpha", "pieces") and kind in (int, float, bool, str)
    }


def typed(name: str, text: str, kind_of: str, errors: list[str]) -> Any:
    """The value of `text`, or None and an error."""
    read = {
        "int": int,
        "float": _finite,
        "bool": {"true": True, "false": False, "1": True, "0": False}.__getitem__,
        "str": str,
    }[kind_of]
    try:
        return read(text.strip().lower() if kind_of == "bool" else text)  # type: ignore[operator]
    except (ValueError, KeyError):
        expected = {"bool": "True or False", "float": "a finite number"}.get(kind_of, kind_of)
        errors.append(f"network_args {name}={text}: expected {expected}")
        return None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def off(text: str) -> bool:
    """Whether a value switches off what it is for."""
    return text.strip().lower() in ("", "false", "none", "0", "0.0", "-1")


def patterns(text: str) -> Patterns | None:
    """ "['a.*', 'b']", or one pattern without brackets, -> its patterns; None if it cannot be read."""
    try:
        found = ast.literal_eval(text) if text.lstrip().startswith(("[", "(", "'", '"')) else [text]
        return tuple(re.compile(each) for each in ([found] if isinstance(found, str) else found))
    except (ValueError, SyntaxError, TypeError, re.error):
        return None


def by_pattern(text: str) -> tuple[tuple[re.Pattern[str], float], ...] | None:
    """ "a.*=4,b=8" -> its patterns and their numbers; None if it cannot be read."""
    found = re.findall(r"\s*(.+?)\s*=\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(?:,|$)", text)
    whole = ",".join(f"{pattern}={value}" for pattern, value in found)
    if not found or _bare(text).rstrip(",") != _bare(whole):
        return None
    try:
        return tuple((re.compile(pattern), _finite(value)) for pattern, value in found)
    except (ValueError, re.error):
        return None


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text)
