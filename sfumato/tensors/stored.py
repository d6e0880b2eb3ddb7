"""Weights kept in fewer bits: the formats, what a weight becomes in each of them, and how it is had back.

What a weight becomes are plain tensors by name (`Parts`), so that they are moved, packed and copied as any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
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

    def multiply(self, x: Tensor, parts: Parts, shape: Sequence[int], bias: Tensor | None = None) -> Tensor:
        """x (..., in) @ weight.T + bias, in x's number format."""
        return F.linear(x, self.dequantise(parts, shape, x.dtype), bias)

    def multiply_back(self, dy: Tensor, parts: Parts, shape: Sequence[int]) -> Tensor:
        """dy (..., out) @ weight: the gradient of `multiply` to x."""
        return dy @ self.dequantise(parts, shape, dy.dtype)

    def outline(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """What a weight of this shape becomes, without values (on the meta device)."""
        raise NotImplementedError

    def nbytes(self, shape: Sequence[int]) -> int:
        """What a weight of this shape takes."""
        return sum(t.nbytes for t in self.outline(shape).values())

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

    def outline(self, shape: Sequence[int]) -> dict[str, Tensor]:
        scales = [*self.grouped(torch.empty(tuple(shape), device="meta")).shape[:-1], 1]
        return {
            "codes": torch.empty(tuple(shape), dtype=self.dtype, device="meta"),
            "scale": torch.empty(scales, device="meta"),
        }

    def rounded(self, values: Tensor) -> Tensor:
        """Values within ± `most` -> codes."""
        return values.to(self.dtype)

    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        values = self.grouped(weight)
        scale = (values.abs().amax(-1, keepdim=True) / self.most()).clamp_(min=TINY)
        return {"codes": self.rounded(values / scale).view(weight.shape), "scale": scale}

    def dequantise(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scale = parts["codes"], parts["scale"]
        exact = widened(codes, dtype)  # 8 bits fit every number format that is computed in
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
    of 4), which spreads outliers (ConvRot, as comfy-kitchen lays it out); 0: they are not.

    `kernel`: what multiplies in int8, forward and backward, with x and dy rounded to 8 bits for each row ("torch", or
    "comfy" for comfy-kitchen's forward); "": nothing, the weight is made wide, which is exact."""

    turn: int = 0
    kernel: str = ""

    @classmethod
    def of(cls, shape: Sequence[int], kernel: str = "") -> Int8:
        """Turned in the largest groups that go into the inputs of a weight of this shape; kernels have it in multiples
        of 8."""
        fits = len(shape) == 2 and shape[0] % 8 == 0 and shape[1] % 8 == 0
        return cls(next((n for n in (256, 64, 16) if math.prod(shape[1:]) % n == 0), 0), kernel if fits else "")

    @property
    def name(self) -> str:
        return "int8"

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8

    def most(self) -> float:
        return 127.0

    def grouped(self, weight: Tensor) -> Tensor:
        flat = weight.float().flatten(1)
        return flat if weight.is_meta else turned(flat, self.turn)

    def rounded(self, values: Tensor) -> Tensor:
        return values.round_().to(self.dtype)

    def dequantise(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scale = parts["codes"], parts["scale"]
        # The codes are turned, not the weight: they and their sums are exact in 16 bits but for one rounding.
        return scaled(turned(codes.flatten(1).to(dtype), self.turn), scale, dtype).view(tuple(shape))

    def multiply(self, x: Tensor, parts: Parts, shape: Sequence[int], bias: Tensor | None = None) -> Tensor:
        codes, scale, rows = parts["codes"], parts["scale"], x.reshape(-1, x.shape[-1])
        if not self.kernel or len(rows) <= FEW:
            return Scaled.multiply(self, x, parts, shape, bias)
        if self.kernel == "comfy":
            kind = COMFY_DTYPES.index(x.dtype)
            turn = self.turn > 0, self.turn or 256
            y: Tensor = torch.ops.comfy_kitchen.int8_linear(rows, codes, scale, bias, kind, *turn)
        else:
            y = _int8_product(turned(rows, self.turn), codes.t(), x.dtype, scale.t())
            y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], len(codes))

    def multiply_back(self, dy: Tensor, parts: Parts, shape: Sequence[int]) -> Tensor:
        codes, scale, rows = parts["codes"], parts["scale"], dy.reshape(-1, dy.shape[-1])
        if not self.kernel or len(rows) <= FEW:
            return Scaled.multiply_back(self, dy, parts, shape)
        # The scales of the weight's rows go to dy, over whose rows the sum is.
        return turned(_int8_product(rows * scale.t(), codes, dy.dtype), self.turn).view(*dy.shape[:-1], shape[1])


FEW = 16
"""Rows that are not multiplied in int8: torch's kernel takes more, and there is nothing to win."""
ROWS = 32
"""Rows are filled up to multiples of this for torch's kernel: cuBLAS refuses other numbers of them beside codes that
are not transposed (seen on an H100)."""
COMFY_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
"""Number formats in the order in which comfy-kitchen counts them."""


def _int8_product(x: Tensor, codes: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """x (n, k), rounded to int8 for each row, @ codes (k, m), times a scale (1, m) where there is one."""
    step = (x.abs().amax(-1, keepdim=True).float() / 127.0).clamp_(min=TINY)
    rounded = (x / step).round_().to(torch.int8)
    sums = torch._int_mm(F.pad(rounded, (0, 0, 0, -len(x) % ROWS)), codes)[: len(x)]
    if scale is None:
        return scaled(sums, step, dtype)
    return scaled(sums * step, scale, dtype)


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

    def outline(self, shape: Sequence[int]) -> dict[str, Tensor]:
        rows, inputs = shape[0], math.prod(shape[1:])
        return {
            "codes": torch.empty(rows, inputs // 2, dtype=torch.uint8, device="meta"),
            "scale": torch.empty(rows, inputs // BLOCK, dtype=torch.bfloat16, device="meta"),
            "levels": torch.empty(256, 2, device="meta"),
        }

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

    def outline(self, shape: Sequence[int]) -> dict[str, Tensor]:
        return {"codes": torch.empty(tuple(shape), dtype=self.dtype, device="meta")}

    def dequantise(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return parts["codes"].to(dtype)


NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The quantiles of a normal distribution that QLoRA's authors published, 0 among them."""


def widened(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """codes.to(dtype). Those in fp8 are looked up on the CPU, where PyTorch 2.13 takes 15 times as long to convert."""
    if codes.device.type != "cpu" or not codes.is_floating_point():
        return codes.to(dtype)
    levels = torch.arange(256, dtype=torch.uint8, device=codes.device).view(codes.dtype).to(dtype)
    return levels.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale, multiplied in fp32 and rounded once, without a copy in fp32 where a kernel can do so."""
    return torch.mul(values, scale, out=torch.empty(values.shape, dtype=dtype, device=values.device))


def turned(x: Tensor, group: int) -> Tensor:
    """x (..., n) times a regular Hadamard matrix in groups of `group` along the last dimension (ConvRot): its own
    reverse. 0: x."""
    if not group:
        return x
    return torch.flatten(torch.unflatten(x, -1, (-1, group)) @ _hadamard(group, x.device, x.dtype), -2)


_turns: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(size, size), the Kronecker powers of a 4 x 4 matrix with -1 across and 1 else, of length 1 each; symmetric."""
    real = not torch.compiler.is_compiling() and torch._guards.detect_fake_mode() is None
    if real and (size, device, dtype) in _turns:
        return _turns[size, device, dtype]
    four = 0.5 - torch.eye(4, device=device).flip(0)
    made = four
    for _ in range(round(math.log(size, 4)) - 1):
        made = torch.kron(made, four)
    made = made.to(dtype)  # powers of 2: exact
    if real:
        _turns[size, device, dtype] = made
    return made
