"""GGUF files: names, shapes and types of their tensors without torch, and what the blocks of numbers mean.

Layout: "GGUF", version, number of tensors, number of facts; the facts (key, type, value); for each tensor its name,
sizes (the innermost first), type and place; the tensors' bytes, from an aligned place on
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The types and their sizes are those of the package `gguf`.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sfumato.errors import UserError
from sfumato.formats.header import DTYPES, Header, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"
_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: the fact that gives its shape where it was laid out anew, in rows of 256 numbers (city96's
converter)."""
_VERSIONS = (2, 3)
_LONGEST = 1 << 24
_MOST = 1 << 20
_DIMENSIONS = 8


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # reading it says why


def read(path: Path) -> Header:
    """Tensors as a safetensors header has them (outermost size first; a type that is not safetensors' under its name
    in GGUF), and the facts that are texts or numbers. Errors: `UserError` for a file that is damaged, or of another
    version."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{path}: not a GGUF file")
            version = _number(file, "<I")
            if version not in _VERSIONS:
                kind = "for big-endian machines" if version >> 24 in _VERSIONS else f"of version {version}"
                raise UserError(f"{path}: a GGUF file {kind}; versions 2 and 3 for little-endian machines are read")
            tensors, count = _number(file, "<Q"), _number(file, "<Q")
            if max(tensors, count) > _MOST:
                raise ValueError(f"{tensors} tensors, {count} facts")
            facts = dict(_fact(file) for _ in range(count))
            infos = dict(_tensor(file, facts) for _ in range(tensors))
            alignment = facts.get(_ALIGNMENT, 32)
            if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
                raise ValueError(f"{_ALIGNMENT} is {alignment}, not a power of 2")
            size = file.tell() + -file.tell() % alignment
            needed, there = size + max((info.end for info in infos.values()), default=0), path.stat().st_size
            if needed > there:
                raise ValueError(f"{needed:,} bytes expected, {there:,} found; download or copy it again")
    except (ValueError, TypeError, ArithmeticError, struct.error, RecursionError) as error:
        raise UserError(f"{path}: a damaged or truncated GGUF file ({error})") from None
    metadata = {key: str(value) for key, value in facts.items() if not (value is None or isinstance(value, list))}
    return Header(infos, metadata, size)


def is_block(kind: str) -> bool:
    """Whether numbers of this type stand in blocks, which `dequantised` reads."""
    return kind not in DTYPES and kind in _sizes() and _can_be_read(kind)


def block(kind: str) -> tuple[int, int]:
    """Numbers and bytes of a block of this type."""
    return _sizes()[kind]


def dequantised(kind: str, blocks: Tensor) -> Tensor:
    """(n, bytes of a block) uint8 -> (n, numbers of a block) fp32."""
    import numpy
    import torch
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    from sfumato.tensors.blocks import KINDS

    if kind in KINDS:
        return KINDS[kind][2](blocks)
    with numpy.errstate(all="ignore"):  # what is not finite is told where weights are looked at
        # As one row: a row takes a call of numpy of its own.
        made = quants.dequantize(blocks.reshape(1, -1).numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(made).view(len(blocks), -1)


@cache
def _kinds() -> dict[int, str]:
    from gguf.constants import GGMLQuantizationType

    return {int(kind): kind.name for kind in GGMLQuantizationType}


@cache
def _sizes() -> dict[str, tuple[int, int]]:
    from gguf.constants import GGML_QUANT_SIZES

    return {kind.name: sizes for kind, sizes in GGML_QUANT_SIZES.items()}


@cache
def _can_be_read(kind: str) -> bool:
    import numpy
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    try:
        quants.dequantize(numpy.zeros((1, block(kind)[1]), numpy.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def _tensor(file: BinaryIO, facts: dict[str, Any]) -> tuple[str, TensorInfo]:
    name, count = _text(file), _number(file, "<I")
    if count > _DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {count} dimensions")
    sizes = [_number(file, "<Q") for _ in range(count)]
    number, start = _number(file, "<I"), _number(file, "<Q")
    kind = _kinds().get(number, f"type {number}")
    numbers, size = _sizes().get(kind, (1, 0))
    shape = tuple(facts.get(_SHAPE + name) or reversed(sizes))
    if (
        not all(type(n) is int and n > 0 for n in shape)
        or math.prod(shape) != math.prod(sizes)
        or (sizes and sizes[0] % numbers)
    ):
        raise ValueError(f"tensor {name!r} of {sizes} numbers is said to be {list(shape)} in {kind}")
    return name, TensorInfo(kind, shape, start, start + math.prod(sizes) // numbers * size)


def _fact(file: BinaryIO) -> tuple[str, Any]:
    key, kind = _text(file), _number(file, "<I")
    return key, _value(file, kind)


def _value(file: BinaryIO, kind: int) -> Any:
    """A fact's value; None for long lists, which are passed over."""
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "<I"), _number(file, "<Q")
        if count > _LONGEST:
            raise ValueError(f"a list of {count} values")
        if count <= _DIMENSIONS:
            return [_value(file, inner) for _ in range(count)]
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
