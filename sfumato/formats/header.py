"""The header of a safetensors file: read strictly, so that what is wrong with a file is known before a weight is
needed.

Layout: 8 bytes of length, a JSON object {name: {dtype, shape, data_offsets}, "__metadata__": {text: text}}, then the
tensors' bytes without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sfumato.errors import UserError

DTYPES = {  # safetensors' spelling: torch's; in the order in which the safetensors library lays tensors out, backwards
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
LARGEST = 100_000_000
"""Bytes of the largest header: the safetensors library's own limit."""
_BYTES = dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1) | dict.fromkeys(
    ("I16", "U16", "F16", "BF16"), 2
)
_BYTES |= dict.fromkeys(("I32", "U32", "F32"), 4) | dict.fromkeys(("C64", "F64", "I64", "U64"), 8)
_LONGEST_SIDE = 2**31  # what torch's kernels count with
_MOST_NUMBERS = 2**62


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file, without its values."""

    dtype: str
    """As safetensors spells it: F32, BF16 ..."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header (in a pickle: as if the tensors stood one after another)."""
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds, in the order of its bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    size: int = 0
    """Bytes before the first tensor."""


def parse(text: bytes, file_size: int, where: str) -> Header:
    """The header whose JSON is `text`, of a file of `file_size` bytes. Errors: `UserError` with what is damaged;
    `where`: the file."""
    try:
        tensors, metadata = _entries(text)
    except RecursionError:
        raise UserError(f"{where}: not a safetensors file (its header is nested too deeply)") from None
    except ValueError as error:
        raise UserError(
            f"{where}: not a safetensors file, or a damaged one: its header is not a table of tensors ({error})"
        ) from None
    _check_layout(where, tensors, file_size - 8 - len(text))
    return Header(dict(tensors), dict(metadata), 8 + len(text))


@lru_cache(4)
def _entries(text: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a header, in the order of their bytes, and its metadata; kept, as several parts ask for a file's
    header before it is open. Errors: `ValueError` with what is wrong."""
    entries = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    if not isinstance(entries, dict) or not text.startswith(b"{"):
        raise ValueError("it is not a JSON object")
    metadata = _metadata(entries.pop("__metadata__", {}))
    tensors = {_name(name): _tensor(name, entry) for name, entry in entries.items()}
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[0]))), metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys stand once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        before: set[str] = set()
        twice = next(key for key, _ in pairs if key in before or before.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} stands in it twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict):
        raise ValueError(f"__metadata__ is {_shown(found)}, expected a table of texts")
    if odd := [key for key, value in found.items() if not isinstance(value, str)]:
        raise ValueError(f"the metadata {odd[0]!r} is {_shown(found[odd[0]])}, expected text")
    return {_name(key): _name(value) for key, value in found.items()}


def _name(text: str) -> str:
    """Text that can be written as UTF-8: JSON's escapes allow halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is not Unicode text") from None
    return text


def _tensor(name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r} is {_shown(entry)}, expected a table of dtype, shape and data_offsets")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    # A format that is newer than this list may stand here: `show` prints it, and training refuses it.
    if not isinstance(dtype, str) or not re.fullmatch(r"[A-Z][A-Z0-9_]*", dtype):
        raise ValueError(f"tensor {name!r} has the dtype {_shown(dtype)}; expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_count(n) and n < _LONGEST_SIDE for n in shape):
        raise ValueError(f"tensor {name!r} has the shape {_shown(shape)}; expected a list of whole numbers")
    if math.prod(max(n, 1) for n in shape) >= _MOST_NUMBERS:
        raise ValueError(f"tensor {name!r} has the shape {_shown(shape)}, which no file can hold")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_count, offsets))
        or offsets[0] > offsets[1]
    ):
        raise ValueError(f"tensor {name!r} has the data_offsets {_shown(offsets)}; expected its first byte and its end")
    return TensorInfo(dtype, tuple(shape), *offsets)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _shown(value: object) -> str:
    """A value for a message, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _check_layout(where: str, tensors: Mapping[str, TensorInfo], size: int) -> None:
    """Every tensor has the bytes that its shape asks for, and together they are the rest of the file."""
    at = 0
    for name, info in tensors.items():
        fits = info.dtype not in _BYTES or info.end - info.start == math.prod(info.shape) * _BYTES[info.dtype]
        if info.start != at or not fits:
            raise UserError(
                f"{where}: damaged: the header's place for {name!r} does not fit its shape {list(info.shape)} of "
                f"{info.dtype}"
            )
        at = info.end
    if size < at:
        raise UserError(
            f"{where}: truncated: {at:,} bytes of tensors expected, {size:,} found; download or copy it again"
        )
    if size > at:
        raise UserError(f"{where}: damaged: {size - at:,} bytes follow the last tensor; download or copy it again")
