"""TOML with the line of every key; JSON for dataset files; a record written back as TOML."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import UserError
from sfumato.formats.paths import printable
from sfumato.formats.text import parse_json, parse_toml, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Path_ = tuple[str | int, ...]
"""Where a key stands: ("datasets", 0, "subsets", 1, "image_dir")."""


def read(path: str | Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    """The content of a TOML or JSON file, and the line of each key (none for JSON). Raises UserError."""
    text = read_text(path)
    if str(path).lower().endswith(".json"):
        content = parse_json(path, text)
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected an object with datasets, found {type(content).__name__}")
        return content, {}
    return parse_toml(path, text), lines(text)


_ENDS = ("]", "}", '"""', "'''")
"""What the last line of a value over several lines holds; without it a long list would be parsed anew with each of its
lines."""


def lines(text: str) -> dict[Path_, int]:
    """The line (from 1) of every key and table of a TOML text that parses."""
    found: dict[Path_, int] = {}
    counts: dict[Path_, int] = {}
    table: Path_ = ()
    start, chunk = 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not chunk and not line.split("#")[0].strip():
            continue
        begun = bool(chunk)
        start, chunk = (start, f"{chunk}\n{line}") if begun else (number, line)
        if begun and not any(mark in line for mark in _ENDS):
            continue
        try:
            content = tomllib.loads(chunk)  # a value over several lines parses with its last one
        except tomllib.TOMLDecodeError:
            continue
        if chunk.lstrip().startswith("["):
            table = _table(content, counts, array=chunk.lstrip().startswith("[["))
            found.setdefault(table, start)
        else:
            for path in _paths(content):
                found[table + path] = start
        chunk = ""
    return found


def _table(header: dict[str, Any], counts: dict[Path_, int], *, array: bool) -> Path_:
    """The path of a `[table]` or `[[table]]` line; `counts`: elements seen of each array."""
    path: Path_ = ()
    content: Any = header
    while content:
        [(name, content)] = content.items()
        content = content[0] if isinstance(content, list) else content
        path = (*path, name)
        if array and not content:
            counts[path] = counts.get(path, 0) + 1
        if path in counts:
            path = (*path, counts[path] - 1)
    for inner in [p for p in counts if array and len(p) > len(path) and p[: len(path)] == path]:
        del counts[inner]
    return path


def _paths(content: dict[str, Any]) -> Iterable[Path_]:
    for name, value in content.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *rest) for rest in _paths(value))


def write(tables: Mapping[str, object]) -> str:
    """Dataclass records as TOML tables, in order; a field that is None is left out."""
    return "\n".join(
        "\n".join([f"[{name}]", *_rows(record), ""]) for name, record in tables.items() if record is not None
    )


def write_array(name: str, records: Iterable[tuple[object, Mapping[str, Iterable[object]]]]) -> str:
    """Records as `[[name]]`, each followed by its inner arrays of records."""
    out: list[str] = []
    for record, inner in records:
        out += [f"[[{name}]]", *_rows(record), ""]
        for key, elements in inner.items():
            for element in elements:
                out += [f"[[{name}.{key}]]", *_rows(element), ""]
    return "\n".join(out)


def _rows(record: object) -> list[str]:
    assert is_dataclass(record)
    pairs = [(f.name, getattr(record, f.name)) for f in fields(record)]
    return [f"{name} = {_literal(value)}" for name, value in pairs if value is not None and not _records(value)]


def _records(value: object) -> bool:
    return isinstance(value, tuple) and any(is_dataclass(v) for v in value)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(v) for v in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(str(name))} = {_literal(v)}' for name, v in value.items())}}}"
    if isinstance(value, str):
        return json.dumps(printable(value), ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # JSON's escapes are TOML's, but for DEL
    return repr(value)
