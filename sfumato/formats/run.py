"""A run's whole state in one folder: saved in one move, checked when loaded, no pickle.

NAME-state/
  manifest.json           written last: size and sha256 of each file, and when
  facts.json              plain values
  <part>.safetensors      tensors, one file a part: "adapter", "optimizer", "ema" ...
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.files import file_digest, full_disk, is_full, load, save, write_text

_log = logging.getLogger(__name__)
_STALE = 600  # seconds after which an unfinished folder is taken for a dead run's


def save_run(folder: str | Path, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write part name -> tensors and JSON-able facts; `folder` is the old state or the whole new one at any moment.

    Errors: `UserError` when the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    temp = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    _clean(folder.parent)
    try:
        temp.mkdir(parents=True)
        for name, part in tensors.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"{name!r} is no name for a file")
            save(temp / f"{name}.safetensors", part)
        write_text(temp / "facts.json", json.dumps(facts, indent=1))
        files = {p.name: {"size": p.stat().st_size, "sha256": file_digest(p)} for p in sorted(temp.iterdir())}
        write_text(temp / "manifest.json", json.dumps({"written": time.time(), "files": files}, indent=1))
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if not isinstance(error, (UserError, OSError)):
            raise
        needed = sum(t.nbytes for part in tensors.values() for t in part.values())
        why = full_disk(folder, needed) if is_full(error) else str(error)
        raise UserError(f"the state of the run could not be saved: {why}") from error
    _exchange(temp, folder)


def load_run(folder: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(part name -> tensors, facts), every file checked against the manifest. Errors: `UserError` naming what is damaged."""
    folder = Path(folder)
    _clean(folder.parent)
    if damage := damages(folder):
        raise UserError(f"{folder}: cannot resume from this state: {'; '.join(damage)}")
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: cannot resume from this state: facts.json cannot be read ({error})") from None
    if not isinstance(facts, dict):
        raise UserError(f"{folder}: cannot resume from this state: facts.json is damaged")
    return {p.stem: load(p) for p in sorted(folder.glob("*.safetensors"))}, facts


def damages(folder: Path) -> list[str]:
    """What keeps a state from being whole; empty when it is."""
    if not folder.is_dir():
        return ["no such folder"]
    try:
        files = _listed(folder / "manifest.json")
        said = [message for name, fact in files.items() if (message := _damage(folder / name, *fact))]
    except FileNotFoundError:
        return ["it has no manifest.json, so sfumato did not write it or did not finish"]
    except OSError as error:
        return [f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ["manifest.json is damaged"]
    if "facts.json" not in files:
        said.append("facts.json is not in the manifest")
    foreign = {p.name for p in folder.glob("*.safetensors")} - files.keys()
    return said + [f"{name} is not in the manifest" for name in sorted(foreign)]


def _listed(manifest: Path) -> dict[str, tuple[int, str]]:
    """A manifest's files: name -> size and sha256. Errors: `OSError`, or whatever comes of another shape."""
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    if not all(re.fullmatch(r"\w[\w.-]*", name) for name in files):
        raise ValueError("a state's files stand in its own folder")
    return {name: (int(fact["size"]), str(fact["sha256"])) for name, fact in files.items()}


def _damage(path: Path, size: int, digest: str) -> str:
    """What is wrong with a file of a state, or nothing."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size:,} bytes, {size:,} were written"
    return f"{path.name} was changed since it was written" if file_digest(path) != digest else ""


def newest(parent: str | Path, named: str) -> Path | None:
    """The state written last of the whole ones in `parent` whose names fit the pattern `named`; damaged ones are logged and passed over."""
    parent = Path(parent)
    if not parent.is_dir():
        return None
    _clean(parent)
    found = [p for p in parent.iterdir() if re.fullmatch(named, p.name) and (p / "manifest.json").is_file()]
    for folder in sorted(found, key=_written, reverse=True):
        if not (damage := damages(folder)):
            return folder
        _log.warning("%s is passed over: %s", folder, "; ".join(damage))
    return None


def _written(folder: Path) -> float:
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        return float(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["written"])
    return -math.inf


def _exchange(temp: Path, folder: Path) -> None:
    """Put `temp` in the place of `folder`; an old folder is kept as `.NAME.old` until the new one stands."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(temp, folder)
    shutil.rmtree(old, ignore_errors=True)


def _clean(parent: Path) -> None:
    """Mend what a kill left: an old folder moved away without its successor comes back, unfinished ones go."""
    for old in parent.glob(".*.old"):
        if not (name := old.with_name(old.name[1:-4])).exists() and (old / "manifest.json").is_file():
            os.replace(old, name)
    for part in parent.glob(".*.part"):
        if part.is_dir() and time.time() - part.stat().st_mtime > _STALE:
            shutil.rmtree(part, ignore_errors=True)


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
        (kind, held), *_ = packed.items()
        match kind:
            case "$tensor":
                return tensors[held]
            case "$tuple":
                return tuple(_unpack(v, tensors) for v in held)
            case "$dict":
                return {_unpack(k, tensors): _unpack(v, tensors) for k, v in held}
            case "$float":
                return float(held)
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
    raise TypeError(f"{path or 'value'}: a {type(value).__module__}.{type(value).__qualname__} cannot be kept in a run's state")
