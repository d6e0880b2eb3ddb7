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
from sfumato.formats import leftovers
from sfumato.formats.paths import printable, trouble

FOLDERS = frozenset({"train_data_dir", "reg_data_dir", "image_dir", "conditioning_data_dir", "tokenizer"})
FILES = frozenset({"dataset_config", "sample_prompts", "network_weights", "base_weights"})
MADE = frozenset({"output_dir", "logging_dir", "cache_dir"})
"""Folders that are made where they are missing."""
EITHER = frozenset({"pretrained_model_name_or_path", "vae"})
"""A file, a folder or a hub id; families have more such options."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@cache
def _either() -> frozenset[str]:
    return EITHER.union(*(families.facts(name).paths for name in families.names()))


@cache
def names() -> frozenset[str]:
    """All settings that hold paths."""
    return FOLDERS | FILES | MADE | _either() | {"resume"}


def is_hub_id(name: str) -> bool:
    """`owner/name`, where nothing on this machine has that name or could have been meant."""
    path = Path(name)
    here = os.path.exists(path) or os.path.exists(path.parent)
    return bool(_HUB_ID.fullmatch(name)) and not here and path.suffix.lower() not in _WEIGHTS


def expanded(name: str) -> Path:
    """A path with the user's home for `~`; the home of nobody stays as it is written."""
    return Path(os.path.expanduser(name))


def settle(given: Given, report: Report) -> Given:
    """A setting with its paths checked; those of a file may stand beside that file as well as in the current folder."""
    if (
        given.key in MADE
        and isinstance(given.value, str)
        and given.value
        and (said := _in_the_way(expanded(given.value)))
    ):
        report.error(f"{given}: {said}; choose another folder")
    if given.key not in FOLDERS | FILES | _either() | {"resume"}:
        return given
    beside = given.source.parent if given.source else None
    if isinstance(given.value, (list, tuple)):
        return replace(given, value=[_settled(given, value, beside, report) for value in given.value])
    return replace(given, value=_settled(given, given.value, beside, report))


def _settled(given: Given, value: object, beside: Path | None, report: Report) -> object:
    if not isinstance(value, str) or not value or (given.key == "resume" and value == "auto"):
        return value  # of the wrong type, or not set
    path = expanded(value)
    if beside is not None and not path.is_absolute() and not os.path.exists(path) and os.path.exists(beside / path):
        value, path = str(beside / path), beside / path
    if given.key == "resume":
        leftovers.restore(
            path.parent, lambda name: name == path.name
        )  # if a run was killed while it replaced this state
    if said := _wrong(given.key, value, path, beside):
        report.error(f"{given}: {said}")
    return value


def _wrong(key: str, value: str, path: Path, beside: Path | None) -> str:
    what = "file or folder" if key in _either() else "file" if key in FILES else "folder"
    if not trouble(path, what) or (key in _either() and is_hub_id(value)):
        return ""
    return _missing(what, path, beside)


def _missing(what: str, path: Path, beside: Path | None) -> str:
    said, name = trouble(path, what), short(path)
    if said.startswith("is a "):
        return f"expected a {what}, but {name} {said.partition(',')[0]}"
    if said != "does not exist":
        return f"{what} {name} {said}"
    start = (
        ""
        if path.is_absolute()
        else f" (looked for in {Path.cwd()}{f' and {beside}' if beside and str(beside) != '.' else ''})"
    )
    return f"{what} {name} does not exist{near(path) or start}"


def _in_the_way(path: Path) -> str:
    """Why no folder can be made at a path; empty when it is there or can be."""
    for folder in (path, *path.parents):
        if (said := trouble(folder, "folder")) != "does not exist":
            return said and f"{short(folder)} {said}"
    return ""


def missing(what: str, path: Path) -> str:
    """Why there is no file at a path, `what` being its name in the message; empty when there is one."""
    said = trouble(path)
    if said == "does not exist":
        said += near(path) or ("" if path.is_absolute() else f" (relative paths start at {Path.cwd()})")
    return f"{what} {short(path)} {said}" if said else ""


def short(path: Path) -> str:
    """A path for a message; of a very long one both ends."""
    text = printable(path)
    return text if len(text) <= 400 else f"{text[:60]} ... {text[-60:]} ({len(text)} characters)"


def near(path: Path) -> str:
    """What lies where the first missing part of a path should, under the nearest name."""
    missing = path
    while missing.parent != missing and not os.path.exists(missing.parent):
        missing = missing.parent
    try:
        close = nearest(missing.name, [entry.name for entry in os.scandir(missing.parent)])
    except (OSError, ValueError):
        return ""
    return close if missing == path or not close else f" (there is no {missing}){close}"
