"""A run's whole state in one folder: saved in one move, checked when loaded, no pickle.

NAME-state/
  manifest.json           written last: size and sha256 of each file, and when
  facts.json              plain values
  <part>.safetensors      tensors, one file per part: "adapter", "optimizer", "ema" ...
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import UserError, WriteError
from sfumato.formats import leftovers
from sfumato.formats.files import file_digest, load, save, write_text
from sfumato.formats.folders import aside_folder

_log = logging.getLogger(__name__)
_TRIES = 5
"""Times a state is read anew when another process replaces it meanwhile."""


def save_run(folder: str | Path, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write part name -> tensors and JSON-able facts; `folder` is the old state or the whole new one at any moment.

    Errors: `WriteError` when the disk is full or the folder cannot be written; `UserError` when it is a user's own.
    """
    folder = Path(folder)
    if odd := next((name for name in tensors if not re.fullmatch(r"\w[\w.-]*", name)), None):
        raise ValueError(f"{odd!r} is not a name for a file")
    needed = sum(t.nbytes for part in tensors.values() for t in part.values())
    try:
        with aside_folder(folder, needed) as temp:
            for name, part in tensors.items():
                save(temp / f"{name}.safetensors", part)
            write_text(temp / "facts.json", json.dumps(facts, indent=1))
            files = {p.name: {"size": p.stat().st_size, "sha256": file_digest(p)} for p in sorted(temp.iterdir())}
            write_text(temp / "manifest.json", json.dumps({"written": time.time(), "files": files}, indent=1))
    except WriteError as error:
        raise WriteError(f"the state of the run could not be saved: {error}") from error


def load_run(folder: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(part name -> tensors, facts), every file checked against the manifest. Errors: `UserError` naming what is
    damaged.

    The tensors are in memory of their own: a state that a run goes on from is replaced by that run, and neither may a
    file that is mapped be replaced on Windows, nor one that changes change what is trained.
    """
    folder = Path(folder)
    leftovers.restore(folder.parent, lambda name: name == folder.name)
    for wait in range(_TRIES):
        before, damage = _manifest(folder), damages(folder)
        with suppress(OSError, UserError, ValueError):
            if not damage:
                parts = {
                    p.stem: {n: t.clone() for n, t in load(p).items()} for p in sorted(folder.glob("*.safetensors"))
                }
                facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
                if _manifest(folder) == before:
                    return parts, facts
        if damage and _manifest(folder) == before and folder.is_dir():
            break  # nobody is replacing it: it is damaged
        time.sleep(0.05 * wait)
    raise UserError(
        f"{folder}: cannot resume from this state: {'; '.join(damage) or 'other processes keep replacing it'}"
    )


def check_whole(folder: Path) -> None:
    """Errors: `UserError` if a state is not whole as far as names and sizes show, which costs nothing."""
    leftovers.restore(folder.parent, lambda name: name == folder.name)
    for wait in range(_TRIES):
        before, damage = _manifest(folder), damages(folder, content=False)
        if not damage:
            return
        if _manifest(folder) == before and folder.is_dir():
            break  # nobody is replacing it: it is damaged
        time.sleep(0.05 * wait)
    raise UserError(f"{folder}: cannot resume from this state: {'; '.join(damage)}")


def damages(folder: Path, *, content: bool = True) -> list[str]:
    """What keeps a state from being whole; empty when it is. `content`: whether to read all files, to compare their
    digests."""
    if not folder.is_dir():
        return ["no such folder"]
    manifest = _manifest(folder)
    if manifest is None:
        return ["it has no manifest.json, so sfumato did not write it or did not finish"]
    files = manifest.get("files")
    if (
        not isinstance(files, dict)
        or "facts.json" not in files
        or not all(_is_entry(name, fact) for name, fact in files.items())
    ):
        return ["manifest.json is damaged"]
    found = [_damage(folder / name, fact, content) for name, fact in files.items()]
    if not any(found) and not isinstance(_json(folder / "facts.json"), dict):
        found.append("facts.json is damaged")
    foreign = {p.name for p in folder.glob("*.safetensors")} - files.keys()
    return [text for text in found if text] + [f"{name} is not in the manifest" for name in sorted(foreign)]


def _is_entry(name: str, fact: object) -> bool:
    """Whether a line of a manifest names a file in the folder with its size and digest."""
    plain = re.fullmatch(r"\w[\w.-]*", name)
    return (
        bool(plain) and isinstance(fact, dict) and type(fact.get("size")) is int and isinstance(fact.get("sha256"), str)
    )


def _damage(path: Path, fact: Mapping[str, Any], content: bool) -> str:
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return f"{path.name} is missing"
        if size != fact["size"]:
            return f"{path.name} has {size:,} bytes, {fact['size']:,} were written"
        return (
            ""
            if not content or file_digest(path) == fact["sha256"]
            else f"{path.name} was changed since it was written"
        )
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def newest(parent: str | Path, named: str) -> Path | None:
    """The whole state of the highest step in `parent`, of several the one written last, whose name fits the pattern
    `named`.

    Damaged ones are logged and passed over. A clock that was set back does not matter: the step decides.
    """
    parent = Path(parent)
    fits, bad = re.compile(named).fullmatch, dict[Path, str]()
    leftovers.restore(parent, fits)
    for wait in range(_TRIES):
        time.sleep(0.05 * wait)
        if leftovers.exchanging(parent, fits) and wait < _TRIES - 1:
            continue
        states = {p: _manifest(p) for p in _folders(parent) if fits(p.name)}
        bad = {}
        for folder in sorted(states, key=_age, reverse=True):
            if not (damage := damages(folder)):
                _warn(bad)
                return folder
            bad[folder] = "; ".join(damage)
        if states == {p: _manifest(p) for p in _folders(parent) if fits(p.name)} and not leftovers.exchanging(
            parent, fits
        ):
            break  # nobody is replacing one: they are damaged
    _warn(bad)
    return None


def _warn(bad: Mapping[Path, str]) -> None:
    for folder, damage in bad.items():
        _log.warning("%s is passed over: %s", folder, damage)


def _folders(parent: Path) -> list[Path]:
    with suppress(OSError):
        return [p for p in parent.iterdir() if p.is_dir()]
    return []


def _age(folder: Path) -> tuple[float, float]:
    """What states are ordered by: the optimizer step, then the time of writing."""
    facts, manifest = _json(folder / "facts.json"), _manifest(folder) or {}
    # One whose facts cannot be read is first, and reported as damaged.
    step = _number(facts.get("step")) if isinstance(facts, dict) else math.inf
    return step, _number(manifest.get("written"))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else -math.inf


def _manifest(folder: Path) -> dict[str, Any] | None:
    """None: there is none, or none that can be read; {}: it is not one."""
    if not (folder / "manifest.json").is_file():
        return None
    content = _json(folder / "manifest.json")
    return content if isinstance(content, dict) else {}


def _json(path: Path) -> object:
    """A JSON file's content; None when it cannot be read as such."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


# --- nested values, without pickle ---


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts, lists, tuples, numbers, strings, None and tensors -> (JSON-able value, tensors by their path).

    Made for `optimizer.state_dict()`. Errors: `TypeError` naming the place of anything else.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(value, "", tensors), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`. Errors: `UserError` for what `pack` does not write."""
    try:
        return _unpack(packed, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the state's values are damaged ({type(error).__name__}: {error})") from error


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_unpack(v, tensors) for v in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) == 1:
        (kind, content), *_ = packed.items()
        match kind:
            case "$tensor":
                return tensors[content]
            case "$tuple":
                return tuple(_unpack(v, tensors) for v in content)
            case "$dict":
                return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
            case "$float":
                return float(content)
    return {k: _unpack(v, tensors) for k, v in packed.items()}


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = path if path and path not in tensors else f"{path}#{len(tensors)}"
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}  # JSON has no such numbers
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [_pack(v, f"{path}.{i}" if path else str(i), tensors) for i, v in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        pairs = [(k, _pack(v, f"{path}.{k}" if path else str(k), tensors)) for k, v in value.items()]
        if all(type(k) is str and not k.startswith("$") for k, _ in pairs):
            return dict(pairs)
        return {"$dict": [[_pack(k, path, tensors), v] for k, v in pairs]}
    raise TypeError(
        f"{path or 'value'}: a {type(value).__module__}.{type(value).__qualname__} cannot be stored in a run's state"
    )
