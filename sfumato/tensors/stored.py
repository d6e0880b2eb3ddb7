"""Weights kept in fewer bits: the formats, what a weight becomes in each of them, and how it is had back.

What a weight becomes are plain tensors by name (`Parts`), so that they are moved, packed and copied as any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
BLOCK = 64
"""Inputs of a row that share a scale, as in musubi-tuner's and sd-scripts' fp8 and in bitsandbytes' nf4."""
TINY = 1e-30
"""The least scale: a row of zeros is divided by something."""


@dataclass(frozen=True, slots=True)
class Format:
    """A number format of a weight (out, in) or (out, in, height, width) whose rows are stored on their own."""

    names: ClassVar[tuple[str, ...]] = ("codes", "scale")
    """Of the tensors that a weight becomes. Their first dimensions go along the rows, but for those of `common`."""
    common: ClassVar[frozenset[str]] = frozenset()
    """Those of `names` that are the same for all rows."""

    @property
    def name(self) -> str:
        """For messages."""
        raise NotImplementedError

    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        """A weight, in fp32 or less -> what is stored, on its device."""
        raise NotImplementedError

    def dequantise(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The reverse: a weight of this shape."""
        raise NotImplementedError

    def nbytes(self, shape: Sequence[int]) -> int:
        """What a weight of this shape takes."""
        parts = self.quantise(torch.empty(tuple(shape), device="meta"))
        return sum(t.nbytes for t in parts.values())

    def join(self, pieces: Sequence[Parts]) -> dict[str, Tensor]:
        """What consecutive rows of a weight became -> the same of all of them."""
        first = pieces[0]
        return {n: t if n in self.common else torch.cat([piece[n] for piece in pieces]) for n, t in first.items()}


@dataclass(frozen=True, slots=True)
class Scaled(Format):
    """Numbers of few bits times a scale: `codes` shaped as the weight, `scale` () for all of it, (out, 1) for each row,
    or (out, blocks, 1) for each block of inputs, fp32."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        raise NotImplementedError

    def most(self) -> float:
        """The largest code."""
        raise NotImplementedError

    def grouped(self, weight: Tensor) -> Tensor:
        """The weight, fp32, with what shares a scale along the last dimension, (out, in) or (out, blocks, block)."""
        return weight.float().flatten(1)

    def rounded(self, values: Tensor) -> Tensor:
        """Values within ± `most` -> codes."""
        return values.to(self.dtype)

    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        values = self.grouped(weight)
        scale = (values.abs().amax(-1, keepdim=True) / self.most()).clamp_(min=TINY)
        return {"codes": self.rounded(values / scale).view(weight.shape), "scale": scale}

    def dequantise(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scale = parts["codes"], parts["scale"]
        exact = codes.to(dtype)  # 8 bits fit every number format that is computed in
        return scaled(exact.reshape(*scale.shape[:-1], -1), scale, dtype).view(tuple(shape))


@dataclass(frozen=True, slots=True)
class FP8(Scaled):
    """e4m3 with a scale for each `block` inputs of a row; 0: for each row, which is also done where blocks do not go
    into the inputs evenly. ComfyUI's `scaled_fp8` files have one for all of a weight, and are read as well."""

    block: int = BLOCK

    @property
    def name(self) -> str:
        return "fp8"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def most(self) -> float:
        return 448.0

    def grouped(self, weight: Tensor) -> Tensor:
        flat = weight.float().flatten(1)
        return torch.unflatten(flat, 1, (-1, self.block)) if self.block and flat.shape[1] % self.block == 0 else flat


@dataclass(frozen=True, slots=True)
class Int8(Scaled):
    """int8 with a scale for each row. `turn`: the inputs are turned by a Hadamard matrix in groups of so many (a power
    of 4), which spreads outliers (ConvRot, as comfy-kitchen lays it out); 0: they are not."""

    turn: int = 0

    @classmethod
    def of(cls, shape: Sequence[int]) -> Int8:
        """Turned in the largest groups that go into the inputs of a weight of this shape."""
        return cls(next((n for n in (256, 64, 16) if math.prod(shape[1:]) % n == 0), 0))

    @property
    def name(self) -> str:
        return "int8"

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8

    def most(self) -> float:
        return 127.0

    def grouped(self, weight: Tensor) -> Tensor:
        return turned(weight.float().flatten(1), self.turn)

    def rounded(self, values: Tensor) -> Tensor:
        return values.round_().to(self.dtype)

    def dequantise(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scale = parts["codes"], parts["scale"]
        # The codes are turned, not the weight: they and their sums are exact in 16 bits but for one rounding.
        return scaled(turned(codes.flatten(1).to(dtype), self.turn), scale, dtype).view(tuple(shape))


@dataclass(frozen=True, slots=True)
class NF4(Format):
    """4-bit NormalFloat (QLoRA, arXiv:2305.14314): `codes` (out, in / 2) uint8, the first of two numbers in the upper
    half; `scale` (out, in / 64) bf16, the largest number of each 64; `levels` (256, 2), what a byte stands for."""

    names: ClassVar[tuple[str, ...]] = ("codes", "scale", "levels")
    common: ClassVar[frozenset[str]] = frozenset({"levels"})

    @property
    def name(self) -> str:
        return "nf4"

    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        groups = torch.unflatten(weight.float().flatten(1), 1, (-1, BLOCK))
        scale = groups.abs().amax(-1).clamp_(min=TINY).bfloat16()
        values = groups / scale.float().unsqueeze(-1)
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        nearest = torch.bucketize(values.flatten(1), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        upper, lower = torch.unflatten(nearest, 1, (-1, 2)).unbind(-1)
        pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)
        return {"codes": (upper << 4) | lower, "scale": scale, "levels": pairs}

    def dequantise(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scale = parts["codes"], parts["scale"]
        values = parts["levels"].index_select(0, codes.flatten().int())  # int: indices of 8 bits are none
        return scaled(values.view(*scale.shape, BLOCK), scale.float().unsqueeze(-1), dtype).view(tuple(shape))


@dataclass(frozen=True, slots=True)
class Wide(Format):
    """A number format that is computed in: nothing is lost."""

    names: ClassVar[tuple[str, ...]] = ("codes",)
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        return {"codes": weight.to(self.dtype)}

    def dequantise(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return parts["codes"].to(dtype)


NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The quantiles of a normal distribution that QLoRA's authors published, 0 among them."""


def scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale, multiplied in fp32 and rounded once, without a copy in fp32 where a kernel can do so."""
    return torch.mul(values, scale, out=torch.empty(values.shape, dtype=dtype, device=values.device))


def turned(x: Tensor, group: int) -> Tensor:
    """x (..., n) times a regular Hadamard matrix in groups of `group` along the last dimension (ConvRot): its own
    reverse. 0: x."""
    if not group:
        return x
    return torch.flatten(torch.unflatten(x, -1, (-1, group)) @ _hadamard(group, x.device).to(x.dtype), -2)


_turns: dict[tuple[int, torch.device], Tensor] = {}


def _hadamard(size: int, device: torch.device) -> Tensor:
    """(size, size), the Kronecker powers of a 4 x 4 matrix with -1 across and 1 else, of length 1 each; symmetric."""
    known = _turns.get((size, device))
    if known is not None and not torch.compiler.is_compiling() and torch._guards.detect_fake_mode() is None:
        return known
    four = 0.5 - torch.eye(4, device=device).flip(0)
    made = four
    for _ in range(round(math.log(size, 4)) - 1):
        made = torch.kron(made, four)
    if type(made) is Tensor and not torch.compiler.is_compiling():
        _turns[size, device] = made
    return made
