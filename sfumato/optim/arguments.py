"""`key=value` arguments for classes and functions that sfumato does not define: read as Python literals, checked
against the signature."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from sfumato.config.pairs import several
from sfumato.errors import UserError, nearest

_EXPECTED = "expected key=value with a Python value: 0.1, True, None, (0.9, 0.99), 'text'"


def literals(flag: str, texts: Iterable[str]) -> dict[str, Any]:
    """`("betas=(0.9, 0.99)", "fused=True")` -> a dict. Errors: one `UserError` with all that cannot be read."""
    args: dict[str, Any] = {}
    errors = []
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError
            args[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            errors.append(f"{flag} {text!r}: {several(text) or _EXPECTED}")
    if errors:
        raise UserError(*errors)
    return args


def check(
    flag: str, args: Iterable[str], taker: Callable[..., Any], *, taken: Iterable[str] = (), lax: bool = False
) -> None:
    """That `taker` has all these arguments by name, apart from `taken`, which are given otherwise.

    `lax`: a taker with `**kwargs` takes anything. Errors: one `UserError` with all unknown names.
    """
    parameters = inspect.signature(taker).parameters.values()
    if lax and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = [p.name for p in parameters if p.kind not in variadic and p.name not in taken]
    name = getattr(taker, "__name__", str(taker)).strip("_")
    errors = [
        f"{flag}: {name} has no argument {a!r}; it has {', '.join(known)}{nearest(a, known)}"
        for a in args
        if a not in known
    ]
    if errors:
        raise UserError(*errors)


def renamed(args: Mapping[str, Any], spellings: Mapping[str, str], taker: Callable[..., Any]) -> dict[str, Any]:
    """Other spellings of arguments -> those that `taker` has."""
    known = inspect.signature(taker).parameters
    return {spellings[a] if a not in known and spellings.get(a) in known else a: value for a, value in args.items()}


def find(flag: str, path: str, hint: str = "") -> Any:
    """The object at `module.Name`. Errors: `UserError` if the module is not installed (`hint`: how to) or has no such
    name."""
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    # A module of the user's own may fail in any way.
    except Exception as e:
        raise UserError(
            f"{flag} needs the module {module_name!r}, which cannot be imported ({e}){'; ' + hint if hint else ''}"
        ) from e
    if not hasattr(module, name):
        public = [n for n in dir(module) if not n.startswith("_")]
        raise UserError(f"{flag}: {module_name} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)
