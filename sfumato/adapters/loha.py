"""LoHa: the change is the product, number by number, of two low-rank matrices (FedPara, arXiv:2108.06098), in LyCORIS'
names and shapes.

(A1 B1) o (A2 B2) is itself of rank r * r: its factors' rows are the products of all pairs of rows of B1 and B2, and its
columns those of A1 and A2. So a small LoHa costs what a LoRA of that rank does, and the matrix is never built. Where it
is cheaper to build it, it is built again for the backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters.additive import Additive, AdditiveOptions, dora_options, no_dora
from sfumato.adapters.base import LayerOptions, as_input, device_of, init_device
from sfumato.adapters.operation import WRITTEN, Operation, without_autocast
from sfumato.errors import UserError
from sfumato.formats.dialect import ALPHA, DORA, AdapterTensors

A1, B1, A2, B2 = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
T1, T2 = "hada_t1", "hada_t2"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoHaOptions(AdditiveOptions):
    """Settings of one layer's LoHa."""

    use_tucker: bool = False
    """Convolutions larger than 1x1 have Tucker factors: a core of rank x rank x kernel, and a matrix for each side."""


class LoHa(Additive):
    """`y + multiplier * alpha / rank * W x`, W = (w1_a w1_b) o (w2_a w2_b). In Tucker's form each w_b is of the input's
    channels alone, a core t has the kernel, and w_a lies transposed."""

    Options = LoHaOptions
    supports = frozenset({"rank_dropout", "module_dropout"})
    shaping = frozenset({"use_tucker"})
    rows: ClassVar[Mapping[str, int]] = {A1: 0, A2: 0}

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        self.operation = Operation(base)
        out, channels, *kernel = self.operation.shape
        columns, r = channels * math.prod(kernel), options.rank
        self.tucker = isinstance(options, LoHaOptions) and options.use_tucker and columns > channels
        self.dense = r * r * (out + columns + WRITTEN) >= out * columns
        """Whether it is cheaper to build the whole matrix than to go through its r * r ranks."""

        def normal(std: float, *shape: int) -> nn.Parameter:
            start = torch.empty(shape, device=init_device(base))
            start = start.normal_(std=std, generator=generator) if std else start.zero_()
            return nn.Parameter(start.to(device_of(base)))

        a, b = ((r, out), (r, channels)) if self.tucker else ((out, r), (r, columns))
        if self.tucker:
            self.hada_t1, self.hada_t2 = normal(0.1, r, r, *kernel), normal(0.1, r, r, *kernel)
        self.hada_w1_b, self.hada_w1_a = normal(1.0, *b), normal(0.1, *a)
        self.hada_w2_b, self.hada_w2_a = normal(1.0, *b), normal(0.0, *a)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> LayerOptions | None:
        leaves = tensors.keys() - {ALPHA, DORA}
        if leaves not in ({A1, B1, A2, B2}, {A1, B1, A2, B2, T1, T2}):
            return None
        rank = len(tensors[B1])
        alpha = float(tensors.get(ALPHA, rank))
        return LoHaOptions(rank=rank, alpha=alpha, use_tucker=T1 in leaves, **dora_options(tensors))

    def delta(self, x: Tensor) -> Tensor:
        a1, b1, a2, b2 = self._factors()
        x = as_input(x, a1)
        if self.dense:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            y: Tensor = _Dense.apply(self.operation, x, a1, b1, a2, b2)  # type: ignore[no-untyped-call]
        else:
            y = self.operation.mix(self.operation(x, _pairs(b1, b2)), _pairs(a1.T, a2.T).T)
        return self.drop_rows(y, self.operation.channels)

    def product(self, weight: Tensor) -> Tensor:
        return _hadamard(*self._factors()).view(weight.shape) * self.options.scale

    def loraplus_parameters(self) -> list[nn.Parameter]:
        """As sd-scripts has it."""
        return [self.hada_w2_a]

    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(_hadamard(*self._factors()))
        return norm * abs(self.options.scale)

    @classmethod
    def rows_of(cls, tensors: AdapterTensors) -> Mapping[str, int]:
        return {**super().rows_of(tensors), **({A1: 1, A2: 1} if T1 in tensors else {})}

    @classmethod
    def join_factors(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        """At the same rank when all pieces share all but their w_a, else at the sum of their ranks."""
        first = pieces[min(pieces)]
        shared = first.keys() - {A1, A2}
        if len(pieces) == len(rows) and all(
            piece.keys() == first.keys() and all(torch.equal(piece[leaf], first[leaf]) for leaf in shared)
            for piece in pieces.values()
        ):
            return super().join_factors(pieces, rows)
        if any(piece.keys() - {ALPHA} != {A1, B1, A2, B2} for piece in pieces.values()):
            raise UserError("LoHa in Tucker's form of the pieces of a fused layer has no form here for the whole of it")
        parts = [cls.fold_alpha(piece) for _, piece in sorted(pieces.items())]
        rank = sum(len(part[B1]) for part in parts)
        out = {leaf: torch.cat([part[leaf] for part in parts]) for leaf in (B1, B2)}
        for leaf in (A1, A2):
            out[leaf], at = parts[0][leaf].new_zeros(sum(rows), rank), 0
            for i, part in zip(sorted(pieces), parts, strict=True):
                r = len(part[B1])
                out[leaf][sum(rows[:i]) : sum(rows[: i + 1]), at : at + r] = part[leaf]
                at += r
        return out | {ALPHA: torch.tensor(float(rank), dtype=first[B1].dtype)}

    @classmethod
    def fold_alpha(cls, tensors: AdapterTensors) -> AdapterTensors:
        no_dora(cls, tensors)
        a1, rank = tensors[A1], len(tensors[B1])
        scale = float(tensors.get(ALPHA, rank)) / rank
        return {**{k: t for k, t in tensors.items() if k != ALPHA}, A1: (a1.float() * scale).to(a1.dtype)}

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(out, r), (r, columns), (out, r), (r, columns)"""
        if not self.tucker:
            return self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        with without_autocast(self.hada_t1):
            b1, b2 = (
                torch.einsum("ij..., jc -> ic...", t, b).flatten(1)
                for t, b in ((self.hada_t1, self.hada_w1_b), (self.hada_t2, self.hada_w2_b))
            )
        return self.hada_w1_a.T, b1, self.hada_w2_a.T, b2


class _Dense(torch.autograd.Function):
    """x through the built matrix. Only x and the factors are kept: the matrix is as large as the layer's own weight."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.operation = operation
        ctx.save_for_backward(x, a1, b1, a2, b2)
        return operation(x, _hadamard(a1, b1, a2, b2).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        with without_autocast(x):
            a1, b1, a2, b2 = (factor.float() for factor in factors)
            left, right = a1 @ b1, a2 @ b2
            grad_x, grad_w = ctx.operation.gradients(grad, x, (left * right).to(x.dtype), ctx.needs_input_grad[1])
            grad_left, grad_right = right.mul_(grad_w), left.mul_(grad_w)
            grads = grad_left @ b1.T, a1.T @ grad_left, grad_right @ b2.T, a2.T @ grad_right
        return None, grad_x, *(g.to(factor.dtype) for g, factor in zip(grads, factors, strict=True))


def _hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """(a1 b1) o (a2 b2), (out, columns), in fp32: bf16 would round each of the three products."""
    with without_autocast(a1):
        return (a1.float() @ b1.float()) * (a2.float() @ b2.float())


def _pairs(left: Tensor, right: Tensor) -> Tensor:
    """(r, n), (r, n) -> (r * r, n): the products of all pairs of rows."""
    return (left[:, None] * right).flatten(0, 1)


ADAPTER = LoHa
