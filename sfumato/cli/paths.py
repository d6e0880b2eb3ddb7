"""Whether the files and folders that settings name are there, and what lies near when they are not."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from sfumato import families
from sfumato.cli.report import Given, Report
from sfumato.errors import nearest

FOLDERS = frozenset({"train_data_dir", "reg_data_dir", "image_dir", "conditioning_data_dir", "tokenizer"})
FILES = frozenset({"dataset_config", "sample_prompts", "network_weights", "base_weights"})
EITHER = frozenset({"pretrained_model_name_or_path", "vae"})
"""A file, a folder or a hub id; families have more such options."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@cache
def _either() -> frozenset[str]:
    return EITHER.union(*(families.facts(name).paths for name in families.names()))


def is_hub_id(name: str) -> bool:
    """`owner/name`, where nothing on this machine has that name or could have been meant."""
    path = Path(name)
    return bool(_HUB_ID.fullmatch(name)) and not path.exists() and not path.parent.exists() and path.suffix.lower() not in _WEIGHTS


def settle(given: Given, report: Report) -> Given:
    """A setting with its paths checked; those of a file may stand beside that file as well as in the current folder."""
    if given.key not in FOLDERS | FILES | _either() | {"resume"}:
        return given
    beside = given.source.parent if given.source else None
    if isinstance(given.value, (list, tuple)):
        return replace(given, value=[_settled(given, value, beside, report) for value in given.value])
    return replace(given, value=_settled(given, given.value, beside, report))


def _settled(given: Given, value: object, beside: Path | None, report: Report) -> object:
    if not isinstance(value, str) or not value or (given.key == "resume" and value == "auto"):
        return value  # of the wrong type, or not set
    path = Path(value).expanduser()
    if beside is not None and not path.is_absolute() and not path.exists() and (beside / path).exists():
        value, path = str(beside / path), beside / path
    if said := _wrong(given.key, value, path, beside):
        report.error(f"{given}: {said}")
    return value


def _wrong(key: str, value: str, path: Path, beside: Path | None) -> str:
    if key in _either():
        return "" if path.exists() or is_hub_id(value) else _missing("file or folder", path, beside)
    if key in FILES:
        return "" if path.is_file() else _missing("file", path, beside)
    return "" if path.is_dir() else _missing("folder", path, beside)


def _missing(what: str, path: Path, beside: Path | None) -> str:
    if path.exists():
        return f"expected a {what}, but {path} is a {'folder' if path.is_dir() else 'file'}"
    start = "" if path.is_absolute() else f" (looked for in {Path.cwd()}{f' and {beside}' if beside and str(beside) != '.' else ''})"
    return f"{what} {path} does not exist{near(path) or start}"


def near(path: Path) -> str:
    """What lies where the first missing part of a path should, under the nearest name."""
    missing = path
    while missing.parent != missing and not missing.parent.exists():
        missing = missing.parent
    try:
        close = nearest(missing.name, [entry.name for entry in os.scandir(missing.parent)])
    except OSError:
        return ""
    return close if missing == path or not close else f" (there is no {missing}){close}"
