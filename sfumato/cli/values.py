"""What a user wrote -> a value of the setting's type, or a sentence that says what was expected. pydantic's one
place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from sfumato.errors import nearest

PAIR, SPAN = tuple[int, int], tuple[float, float]
PERCENT = re.compile(r"\d+(\.\d+)?%")


def convert(kind: Any, value: object, *, text: bool, lax: bool = False) -> object:
    """A value of type `kind`.

    `text`: the value comes from the command line, as a string or a list of strings; otherwise from TOML or JSON, whose
    types count.
    `lax`: types do not count, as front ends of kohya's scripts write 1 for true, 2.0 for 2 and numbers as texts.
    Raises ValueError with what was expected and what was found.
    """
    inner = parts(kind)
    if value == "" and NoneType in inner:
        return None  # kohya's files write "" where nothing is set
    if value == "" and text and str not in inner:
        raise ValueError(f"expected {expected(kind)}, found nothing")
    try:
        loose = text or (lax and not isinstance(value, bool))
        return _check(kind, _shaped(inner, value, text=loose), strict=not loose)
    except ValueError:  # pydantic's ValidationError is one
        raise ValueError(f"expected {expected(kind)}, found {_shown(value)}{_near(inner, value)}") from None


def _shaped(inner: tuple[Any, ...], value: object, *, text: bool) -> object:
    """Kohya's spellings in the form that the type has: "512,768", a lone value for a list, "10%"."""
    if PAIR in inner:
        return _pair(value)
    if SPAN in inner:
        return _numbers(tuple(value) if isinstance(value, (list, tuple)) else (value,))
    if any(get_origin(i) is tuple for i in inner):
        found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return found if tuple[float, ...] not in inner else _numbers(found)
    if {int, float, str} <= set(inner):
        return _amount(value)
    if text and isinstance(value, str):
        return {str(c): c for i in inner if get_origin(i) is Literal for c in get_args(i)}.get(value, value)
    return value


def _pair(value: object) -> tuple[object, ...]:
    """`512`, `"512,768"`, `[512, 768]`, `["512", "768"]` -> two whole numbers."""
    found = value if isinstance(value, (list, tuple)) else (value,)
    numbers = [
        int(p) if isinstance(p, str) else p for v in found for p in (v.split(",") if isinstance(v, str) else [v])
    ]
    return tuple(numbers * 2 if len(numbers) == 1 else numbers)


def _numbers(values: tuple[object, ...]) -> tuple[object, ...]:
    """`("1e-4,2e-4", 0)` -> the numbers; kohya's lists of many are one text."""
    return tuple(n for v in values for n in (map(float, v.split(",")) if isinstance(v, str) and "," in v else [v]))


def _amount(value: object) -> object:
    """A count, a share below 1, or a percentage."""
    if not isinstance(value, str) or PERCENT.fullmatch(value):
        return value
    return int(value) if re.fullmatch(r"\d+", value) else float(value)


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _check(kind: Any, value: object, *, strict: bool) -> object:
    return _adapter(kind).validate_python(value, strict=strict)


def parts(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def expected(kind: Any) -> str:
    """A type in words."""
    inner = [i for i in parts(kind) if i is not NoneType]
    if {int, float, str} <= set(inner):
        return 'a number or a percentage such as "10%"'
    return " or ".join(_word(i) for i in inner)


def _word(kind: Any) -> str:
    if kind == PAIR:
        return "one whole number or two (width, height)"
    if kind == SPAN:
        return "two numbers"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(c) for c in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each {_word(get_args(kind)[0])}"
    if get_origin(kind) is Mapping:
        return "a table"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))


def _shown(value: object) -> str:
    names = {str: "the text ", list: "the list ", bool: "", int: "the number ", float: "the number "}
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return names.get(type(value), "") + shown


def _near(inner: tuple[Any, ...], value: object) -> str:
    choices = [str(c) for i in inner if get_origin(i) is Literal for c in get_args(i)]
    return nearest(value, choices) if isinstance(value, str) and choices else ""
