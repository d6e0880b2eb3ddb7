"""The header of a GGUF file: names, shapes and quantisation of its tensors; imports no torch.

Layout: "GGUF", version, number of tensors, number of facts; the facts (key, type, value); for each tensor its name,
sizes (the innermost first), type and place (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from sfumato.errors import UserError
from sfumato.formats.header import Header, TensorInfo

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 20: "IQ4_NL", 23: "IQ4_XS", 28: "F64", 30: "BF16",
}  # fmt: skip
PLAIN = ("F32", "F16", "BF16", "F64")
"""Types that are not quantised."""
_LONGEST = 1 << 24
_MOST = 1 << 20


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # reading it says why


def read(path: Path) -> Header:
    """Tensors as a safetensors header has them (outermost size first; places are not given), and the facts that are
    texts or numbers. Errors: `UserError` for a damaged file."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{path}: not a GGUF file")
            version, tensors, facts = _number(file, "<I"), _number(file, "<Q"), _number(file, "<Q")
            if version < 2 or max(tensors, facts) > _MOST:
                raise ValueError(f"version {version}, {tensors} tensors")
            metadata = dict(_fact(file) for _ in range(facts))
            infos = dict(_tensor(file) for _ in range(tensors))
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: a damaged or truncated GGUF file ({error})") from None
    return Header(infos, {key: str(value) for key, value in metadata.items() if value is not None})


def _tensor(file: BinaryIO) -> tuple[str, TensorInfo]:
    name, count = _text(file), _number(file, "<I")
    if count > 8:
        raise ValueError(f"tensor {name!r} has {count} dimensions")
    sizes = [_number(file, "<Q") for _ in range(count)]
    kind = _number(file, "<I")
    _number(file, "<Q")
    return name, TensorInfo(_TYPES.get(kind, f"type {kind}"), tuple(reversed(sizes)), 0, math.prod(sizes))


def _fact(file: BinaryIO) -> tuple[str, Any]:
    key, kind = _text(file), _number(file, "<I")
    return key, _value(file, kind)


def _value(file: BinaryIO, kind: int) -> Any:
    """A fact's value; None for lists, which are passed over."""
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "<I"), _number(file, "<Q")
        if count > _LONGEST:
            raise ValueError(f"a list of {count} values")
        for _ in range(count):
            _value(file, inner)
        return None
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")
    return _number(file, _SCALARS[kind])


def _text(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    if length > _LONGEST:
        raise ValueError(f"a text of {length} bytes")
    return file.read(length).decode()


def _number(file: BinaryIO, kind: str) -> Any:
    (value,) = struct.unpack(kind, file.read(struct.calcsize(kind)))
    return value
