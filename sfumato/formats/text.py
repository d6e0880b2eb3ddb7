"""Text files that people write: UTF-8, TOML and JSON, with one clear message for whatever cannot be read."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from sfumato.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEEPEST = 50
"""Levels of tables and lists in each other; no file that means something has more, and parsers fail beyond some
hundreds."""
_LONG_KEY = re.compile(rf"^[\s\[]*(?:[\w\"'-]+\s*\.\s*){{{DEEPEST}}}", re.MULTILINE)
"""A key of very many parts, which takes a parser gigabytes."""


def read_text(path: str | Path) -> str:
    """A text file's content, without a byte order mark. Errors: `UserError`."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}: is not a text file in UTF-8 ({e.reason} at byte {e.start}); save it as UTF-8"
        ) from None
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None


def parse_toml(path: str | Path, text: str) -> dict[str, Any]:
    """The content of a TOML text; `path` begins messages. Errors: `UserError`."""
    if _LONG_KEY.search(text):
        raise _too_deep(path, "TOML")
    try:
        content = tomllib.loads(text)
    except RecursionError:
        raise _too_deep(path, "TOML") from None
    except ValueError as e:
        raise UserError(_broken(path, text, str(e))) from None
    _check_depth(path, content, "TOML")
    return content


def parse_json(path: str | Path, text: str) -> Any:
    """The content of a JSON text; `path` begins messages. Errors: `UserError`."""
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise _too_deep(path, "JSON") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: is not JSON: {e.msg}") from None
    except ValueError as e:  # a number of thousands of digits, or a name that stands twice
        raise UserError(f"{path}: is not JSON: {e}") from None
    _check_depth(path, content, "JSON")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose names stand there once each. Errors: `ValueError`."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice!r} stands twice in an object")
    return made


def _check_depth(path: str | Path, content: Any, kind: str) -> None:
    level = [content]
    for _ in range(DEEPEST):
        level = [
            inner for c in level if isinstance(c, (dict, list)) for inner in (c.values() if isinstance(c, dict) else c)
        ]
    if level:
        raise _too_deep(path, kind)


def _too_deep(path: str | Path, kind: str) -> UserError:
    return UserError(f"{path}: is not {kind} that can be read: more than {DEEPEST} tables or lists stand in each other")


def _broken(path: str | Path, text: str, message: str) -> str:
    """The parser's message, with the line in front and the usual cause."""
    found = re.search(r" \(at line (\d+), column \d+\)", message)
    if not found:  # at the end of the document
        return f"{path}: is not TOML: {message}"
    number = int(found.group(1))
    line = text.splitlines()[number - 1] if number <= len(text.splitlines()) else ""
    hint = (
        "; in double quotes a backslash starts an escape: write the path with / or in single quotes"
        if "\\" in line
        else ""
    )
    return f"{path}:{number}: is not TOML: {message.replace(found.group(0), '')}: {line.strip()[:200]}{hint}"
