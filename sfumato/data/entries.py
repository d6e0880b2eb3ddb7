"""The bytes of a cached entry: a safetensors file with its key and a checksum, verified whenever it is read."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sfumato.formats import files


class Damaged(Exception):
    """An entry is not what was stored; the message says in a few words what is wrong with it."""


def facts(name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What is written into the file beside the tensors of the entry `name`."""
    header, *payload = files.serialise(tensors)
    return {"key": name, "checksum": _checksum(json.loads(bytes(header[8:])), payload)}


def unpack(name: str, data: bytes) -> dict[str, Tensor]:
    """The tensors in the file of the entry `name`. Raises Damaged."""
    from safetensors.torch import load

    length = int.from_bytes(data[:8], "little")
    try:
        entries = json.loads(data[8 : 8 + length])
        written = entries.pop("__metadata__")
        key, checksum = written["key"], written["checksum"]
        # A fast checksum: it is to find a disk's mistakes, not a forger.
        sound = checksum == _checksum(entries, [memoryview(data)[8 + length :]])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("its entry is damaged") from None
    if key != name:
        raise Damaged("its entry is that of another")
    if not sound:
        raise Damaged("its entry is damaged")
    try:
        tensors = load(data)
    except SafetensorError:
        raise Damaged("its entry is damaged") from None
    # A sum is finite where all values are, and takes a fiftieth of the time of a test of each.
    if not all(math.isfinite(t.float().sum()) for t in tensors.values() if t.is_floating_point()):
        raise Damaged("its entry is not finite")
    return tensors


def _checksum(entries: Mapping[str, Any], payload: Iterable[bytes | memoryview]) -> str:
    """Of the names, types, shapes and values of tensors."""
    crc = zlib.crc32(json.dumps(entries, sort_keys=True).encode())
    for part in payload:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"
