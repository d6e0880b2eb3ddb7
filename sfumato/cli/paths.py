"""Whether the files and folders that settings name are there, and what lies near when they are not."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from sfumato.cli import kohya_settings, options
from sfumato.cli.report import Given, Report
from sfumato.config import SubsetConfig, rules
from sfumato.errors import nearest
from sfumato.formats import leftovers
from sfumato.formats.paths import printable, trouble

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@cache
def _kinds() -> dict[str, str]:
    """Setting -> what it names a path to (`config/rules.py: PathTo`)."""
    every = {**options.known(), **options.of(SubsetConfig, "data")}
    return {name: kind for name, option in every.items() if (kind := rules.path_to(option.hint))}


def is_hub_id(name: str) -> bool:
    """`owner/name`, where nothing on this machine has that name or could have been meant."""
    path = Path(name)
    here = os.path.exists(path) or os.path.exists(path.parent)
    return bool(_HUB_ID.fullmatch(name)) and not here and path.suffix.lower() not in _WEIGHTS


def expanded(name: str) -> Path:
    """A path with the user's home for `~`; the home of nobody stays as it is written."""
    return Path(os.path.expanduser(name))


def settled(given: Mapping[str, Given], report: Report) -> dict[str, Given]:
    """All settings, with their paths checked; a state on the hub has none."""
    hub = given.get("resume_from_huggingface")
    there = {"resume"} if hub and not kohya_settings.off(hub) else set()
    return {key: each if key in there else settle(each, report) for key, each in given.items()}


def settle(given: Given, report: Report) -> Given:
    """A setting with its paths checked; those of a file may stand beside that file as well as in the current folder."""
    kind = _kinds().get(given.key)
    if kind is None:
        return given
    if kind == "new folder":
        if isinstance(given.value, str) and given.value and (problem := _in_the_way(expanded(given.value))):
            report.error(f"{given}: {problem}; choose another folder")
        return given
    beside = given.source.parent if given.source else None
    if isinstance(given.value, (list, tuple)):
        return replace(given, value=[_settled(given, value, beside, report) for value in given.value])
    return replace(given, value=_settled(given, given.value, beside, report))


def _settled(given: Given, value: object, beside: Path | None, report: Report) -> object:
    kind = _kinds()[given.key]
    if not isinstance(value, str) or not value or (kind == "state" and value == "auto") or value.startswith("data:"):
        return value  # of the wrong type, or not set, or the picture itself
    path = expanded(value)
    if beside is not None and not path.is_absolute() and not os.path.exists(path) and os.path.exists(beside / path):
        value, path = str(beside / path), beside / path
    if kind == "state":
        leftovers.restore(
            path.parent, lambda name: name == path.name
        )  # if a run was killed while it replaced this state
    if problem := _wrong(kind, value, path, beside):
        report.error(f"{given}: {problem}")
    return value


def _wrong(kind: str, value: str, path: Path, beside: Path | None) -> str:
    what = {"weights": "file or folder", "state": "folder"}.get(kind, kind)
    if not trouble(path, what) or (kind == "weights" and is_hub_id(value)):
        return ""
    return _missing(what, path, beside)


def _missing(what: str, path: Path, beside: Path | None) -> str:
    problem, name = trouble(path, what), short(path)
    if problem.startswith("is a "):
        return f"expected a {what}, but {name} {problem.partition(',')[0]}"
    if problem != "does not exist":
        return f"{what} {name} {problem}"
    start = (
        ""
        if path.is_absolute()
        else f" (looked for in {Path.cwd()}{f' and {beside}' if beside and str(beside) != '.' else ''})"
    )
    return f"{what} {name} does not exist{near(path) or start}"


def _in_the_way(path: Path) -> str:
    """Why no folder can be made at a path; empty when it is there or can be."""
    for folder in (path, *path.parents):
        if (problem := trouble(folder, "folder")) != "does not exist":
            return problem and f"{short(folder)} {problem}"
    return ""


def missing(what: str, path: Path) -> str:
    """Why there is no file at a path, `what` being its name in the message; empty when there is one."""
    problem = trouble(path)
    if problem == "does not exist":
        problem += near(path) or ("" if path.is_absolute() else f" (relative paths start at {Path.cwd()})")
    return f"{what} {short(path)} {problem}" if problem else ""


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
        close = nearest(missing.name, os.listdir(missing.parent))
    except (OSError, ValueError):
        return ""
    return close if missing == path or not close else f" (there is no {missing}){close}"
