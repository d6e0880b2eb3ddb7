"""Weights in GGUF's blocks, kept as they are: some numbers, of few bits each, with the scales that they share.

A block is a run of bytes (ggml's quants: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). The numbers
are those of the package `gguf`, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.tensors.stored import Format, Parts

Read = Callable[[Tensor], Tensor]
"""(n, bytes of a block) uint8 -> (n, numbers of a block) fp32"""


@dataclass(frozen=True, slots=True)
class Blocks(Format):
    """A weight of whole blocks in each row: `codes` (out, bytes of a row) uint8."""

    names: ClassVar[tuple[str, ...]] = ("codes",)
    kind: str
    """Of `KINDS`."""

    @property
    def name(self) -> str:
        return f"GGUF {self.kind}"

    def dequantise(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        _, size, read = KINDS[self.kind]
        return read(parts["codes"].reshape(-1, size)).to(dtype).view(tuple(shape))

    def nbytes(self, shape: Sequence[int]) -> int:
        numbers, size, _ = KINDS[self.kind]
        return math.prod(shape) // numbers * size


def _half(b: Tensor, at: int) -> Tensor:
    """(n, 1) fp32 of the fp16 number at a byte."""
    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(b: Tensor, run: int, bits: int) -> Tensor:
    """(n, bytes) -> (n, bytes * 8 / bits) uint8: in each `run` bytes the lowest bits of all, then the next ones ..."""
    runs = torch.unflatten(b, 1, (-1, 1, run))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=b.device).view(-1, 1)
    return ((runs >> shifts) & ((1 << bits) - 1)).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_fields(b[:, 2:], 16, 4).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _fields(b[:, 4:], 16, 4).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    fifth = _fields(b[:, 2:6], 1, 1) << 4
    return _half(b, 0) * ((_fields(b[:, 6:], 16, 4) | fifth).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    fifth = _fields(b[:, 4:8], 1, 1) << 4
    return _half(b, 0) * (_fields(b[:, 8:], 16, 4) | fifth).float() + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float() * _half(b, 0)


def _q2_k(b: Tensor) -> Tensor:
    factor, least = (_half(b, 80) * (b[:, :16] & 15).float()), _half(b, 82) * (b[:, :16] >> 4).float()
    return _by_parts(_fields(b[:, 16:80], 32, 2), factor, least)


def _q3_k(b: Tensor) -> Tensor:
    lower, upper = _fields(b[:, 96:104], 8, 4), _fields(b[:, 104:108], 4, 2)
    scale = (lower | (upper << 4)).float() - 32
    third = _fields(b[:, :32], 32, 1)  # 1: nothing is taken off
    codes = _fields(b[:, 32:96], 32, 2).float() - 4 * (1 - third.float())
    return _by_parts(codes, _half(b, 108) * scale)


def _q4_k(b: Tensor) -> Tensor:
    return _by_parts(_fields(b[:, 16:], 32, 4), *_scales(b))


def _q5_k(b: Tensor) -> Tensor:
    fifth = _fields(b[:, 16:48], 32, 1) << 4
    return _by_parts(_fields(b[:, 48:], 32, 4) | fifth, *_scales(b))


def _q6_k(b: Tensor) -> Tensor:
    codes = _fields(b[:, :128], 64, 4) | (_fields(b[:, 128:192], 32, 2) << 4)
    return _by_parts(codes.float() - 32, _half(b, 208) * b[:, 192:208].view(torch.int8).float())


def _scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 8) each: factors of a block's eighths, and what is taken off; 6 bits each of 12 bytes."""
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    factor = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], 1)
    least = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], 1)
    return _half(b, 0) * factor.float(), _half(b, 2) * least.float()


def _by_parts(codes: Tensor, factor: Tensor, least: Tensor | None = None) -> Tensor:
    """Codes times the factor (n, parts) of their part, less what is taken off."""
    values = factor[..., None] * torch.unflatten(codes.float(), 1, (factor.shape[1], -1))
    return (values if least is None else values - least[..., None]).flatten(1)


KINDS: Mapping[str, tuple[int, int, Read]] = {
    "Q4_0": (32, 18, _q4_0), "Q4_1": (32, 20, _q4_1), "Q5_0": (32, 22, _q5_0), "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0), "Q2_K": (256, 84, _q2_k), "Q3_K": (256, 110, _q3_k), "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k), "Q6_K": (256, 210, _q6_k),
}  # fmt: skip
"""Type -> numbers and bytes of a block, and how it is read."""
