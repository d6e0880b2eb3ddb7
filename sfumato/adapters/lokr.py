"""LoKr: the change is the Kronecker product of a small matrix and of one with the rest of the layer's rows and columns,
in LyCORIS' names, shapes and order of factors (arXiv:2309.14859).

(A kron B) x is B along x's inner columns and A along the outer ones, so that the product is not built. Files do not say
how a layer's sizes were divided: that is read off the factors' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.adapters.additive import Additive, AdditiveOptions, dora_options, no_dora
from sfumato.adapters.base import LayerOptions, as_input, device_of, init_device
from sfumato.adapters.operation import WRITTEN, Operation
from sfumato.errors import UserError
from sfumato.formats.dialect import ALPHA, DORA, AdapterTensors
from sfumato.tensors.algebra import factorization

W1, W1A, W1B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2A, W2B, T2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"


class Form(NamedTuple):
    """Which tensors a LoKr has, and their sizes."""

    rows: int
    """Of the first factor; the second has the layer's, divided by that."""
    columns: int
    thin_first: bool
    """Whether the first factor is a product of two of the rank."""
    thin: bool
    """Whether the second one is."""
    tucker: bool
    """Whether the second one, of a convolution, has a core of rank x rank x kernel between its two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoKrOptions(AdditiveOptions):
    """Settings of one layer's LoKr."""

    factor: int = -1
    """The first factor's rows and columns, as near to this as the layer's allow; -1: as near to their square roots."""
    unbalanced_factorization: bool = False
    """Of the two divisors of the layer's rows, the first factor has the larger one."""
    decompose_both: bool = False
    """The first factor is a product of two of the rank as well, where that is smaller."""
    full_matrix: bool = False
    """Neither factor is a product, whatever the rank."""
    use_tucker: bool = False
    """Convolutions larger than 1x1 have Tucker factors: a core of rank x rank x kernel, and a matrix for each side."""
    form: Form | None = None
    """What the tensors of a file have; none: what follows from the settings above."""

    def __post_init__(self) -> None:
        if self.factor == 0 or self.factor < -1:
            raise UserError(f"network_args factor={self.factor}: expected 1 or more, or -1")

    def form_of(self, shape: Sequence[int]) -> Form:
        """That of a layer whose weight has this shape."""
        if self.form is not None:
            return self.form
        (rows, rest), (columns, other_columns) = (
            factorization(shape[0], self.factor),
            factorization(shape[1], self.factor),
        )
        if self.unbalanced_factorization:
            rows, rest = rest, rows
        return Form(
            rows,
            columns,
            thin_first=self.decompose_both and not self.full_matrix and self.rank < max(rows, columns) / 2,
            thin=not self.full_matrix and self.rank < max(rest, other_columns) / 2,
            tucker=self.use_tucker and math.prod(shape[2:]) > 1,
        )


class LoKr(Additive):
    """`y + multiplier * alpha / rank * (w1 kron w2) x`. If neither factor is a product, alpha is the rank: so it is in
    LyCORIS and sd-scripts, and loaders ignore it."""

    Options = LoKrOptions
    supports = frozenset({"rank_dropout", "module_dropout"})
    shaping = frozenset({"factor", "unbalanced_factorization", "decompose_both", "full_matrix", "use_tucker"})
    any_rank = True

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        assert isinstance(options, LoKrOptions)
        operation = Operation(base)
        form = options.form_of(operation.shape)
        if not form.thin and not form.thin_first:
            options = replace(options, alpha=float(options.rank), rs_lora=False)
        super().__init__(base, options, generator)
        self.operation, self.form = operation, form
        out, channels, *kernel = operation.shape
        rows, columns, r = out // form.rows, channels // form.columns, options.rank

        def start(*shape: int, zero: bool = False) -> nn.Parameter:
            values = torch.zeros(shape, device=init_device(base))
            if not zero:
                nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            return nn.Parameter(values.to(device_of(base)))

        if form.thin_first:
            self.lokr_w1_a, self.lokr_w1_b = start(form.rows, r), start(r, form.columns)
        else:
            self.lokr_w1 = start(form.rows, form.columns)
        if not form.thin:
            self.lokr_w2 = start(rows, columns, *kernel, zero=True)
        elif form.tucker:
            self.lokr_t2 = start(r, r, *kernel)
            self.lokr_w2_a, self.lokr_w2_b = start(r, rows), start(r, columns, zero=True)
        else:
            self.lokr_w2_a, self.lokr_w2_b = start(rows, r), start(r, columns * math.prod(kernel), zero=True)
        self.turn = _cheapest_turn(form, operation.shape, [w.shape for w in self._second()])
        """Before which of the second factor's steps the first factor acts; -1: the product is built."""

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> LayerOptions | None:
        leaves = tensors.keys() - {ALPHA, DORA}
        first, second = leaves & {W1, W1A, W1B}, leaves - {W1, W1A, W1B}
        if first not in ({W1}, {W1A, W1B}) or second not in ({W2}, {W2A, W2B}, {W2A, W2B, T2}):
            return None
        rows, columns = tensors[W1].shape if W1 in leaves else (len(tensors[W1A]), tensors[W1B].shape[1])
        form = Form(rows, columns, thin_first=W1 not in leaves, thin=W2 not in leaves, tucker=T2 in leaves)
        if form.thin or form.thin_first:
            rank = len(tensors[W2B if form.thin else W1B])
            return LoKrOptions(rank=rank, alpha=float(tensors.get(ALPHA, rank)), form=form, **dora_options(tensors))
        # Without a product there is no rank: sd-scripts and LyCORIS write theirs as alpha, others 1e10.
        largest = max(rows * len(tensors[W2]), columns * tensors[W2].shape[1])
        rank = max(1, min(int(tensors.get(ALPHA, 1)), largest))
        return LoKrOptions(rank=rank, alpha=float(rank), form=form, **dora_options(tensors))

    def delta(self, x: Tensor) -> Tensor:
        first, steps = self._first(), self._second()
        x = as_input(x, first)
        if self.turn < 0:
            out = self.operation(x, _kronecker(first, steps))
            return self.drop_rows(out, self.operation.channels)
        inner = self._convolve if self.operation.convolution else nn.functional.linear
        channels = self.operation.channels % x.ndim
        h = x.reshape(*x.shape[:channels], self.form.columns, -1, *x.shape[channels + 1 :])
        for i, step in enumerate(steps):
            h = inner(self._outer(first, h) if i == self.turn else h, step)
        h = self._outer(first, h) if self.turn == len(steps) else h
        out = h.flatten(channels, channels + 1)
        return self.drop_rows(out, self.operation.channels)

    def _outer(self, first: Tensor, h: Tensor) -> Tensor:
        """The first factor on h's outer channels: (..., columns, inner) or (b, columns, inner, h, w)."""
        if self.operation.convolution:
            return (first @ h.flatten(2)).view(len(h), -1, *h.shape[2:])
        return nn.functional.linear(h.transpose(-1, -2), first).transpose(-1, -2)

    def _convolve(self, h: Tensor, step: Tensor) -> Tensor:
        """(b, columns, inner, h, w) through a step of the second factor: (out, in, *kernel) or (out, in)."""
        flat = h.flatten(0, 1)
        if step.ndim == 2:
            out = nn.functional.conv2d(flat, step[..., None, None])
        else:
            assert self.operation.convolution is not None
            out = nn.functional.conv2d(flat, step, None, *self.operation.convolution)
        return out.view(*h.shape[:2], *out.shape[1:])

    def product(self, weight: Tensor) -> Tensor:
        first, steps = self._first().float(), [step.float() for step in self._second()]
        return _kronecker(first, steps).view(weight.shape) * self.options.scale

    def loraplus_parameters(self) -> list[nn.Parameter]:
        """As sd-scripts has it."""
        return [p for name, p in self.named_parameters() if name.startswith(W1)]

    def norm(self) -> Tensor:
        """That of a Kronecker product is the product of its factors' norms."""
        first, second = torch.linalg.vector_norm(self._first()), torch.linalg.vector_norm(_product(self._second()))
        norm: Tensor = first * second * abs(self.options.scale)
        return norm

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        full = not self.form.thin and not self.form.thin_first
        super().load_tensors({**tensors, ALPHA: torch.tensor(float(self.options.rank))} if full else tensors)

    @classmethod
    def row_count(cls, tensors: AdapterTensors) -> int:
        return len(tensors[_first_leaf(tensors)]) * _second_rows(tensors)

    @classmethod
    def cut(cls, tensors: AdapterTensors, rows: Sequence[int]) -> list[AdapterTensors]:
        """Rows of the first factor, each of which stands for as many of the layer as the second one has."""
        leaf, each = _first_leaf(tensors), _second_rows(tensors)
        if any(n % each for n in rows):
            raise UserError(
                f"LoKr's second factor has {each} rows, of which pieces of {', '.join(map(str, rows))} rows are no "
                "multiple, so they have no exact form; another factor may have one"
            )
        parts = torch.split(tensors[leaf], [n // each for n in rows])
        return [{**piece, leaf: part} for piece, part in zip(super().cut(tensors, rows), parts, strict=True)]

    @classmethod
    def join_factors(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        first = pieces[min(pieces)]
        leaf, each = _first_leaf(first), _second_rows(first)
        if any(n % each for n in rows) or any(
            piece.keys() != first.keys() or any(not torch.equal(t, first[k]) for k, t in piece.items() if k != leaf)
            for piece in pieces.values()
        ):
            raise UserError("LoKr of the pieces of a fused layer has no exact form unless they share a second factor")
        nothing = first[leaf].new_zeros(max(rows) // each, first[leaf].shape[1])
        parts = [pieces[i][leaf] if i in pieces else nothing[: n // each] for i, n in enumerate(rows)]
        return {**first, leaf: torch.cat(parts)}

    @classmethod
    def move_rows(cls, tensors: AdapterTensors, move: Callable[[Tensor], Tensor]) -> AdapterTensors:
        leaf, each = _first_leaf(tensors), _second_rows(tensors)
        order = move(torch.arange(cls.row_count(tensors))).view(-1, each)
        if not torch.equal(order, order[:, :1] + torch.arange(each)) or order[:, 0].remainder(each).any():
            raise UserError(f"LoKr has no exact form for rows that do not move {each} together")
        moved = super().move_rows(tensors, move) if DORA in cls.rows_of(tensors) else tensors
        return {**moved, leaf: tensors[leaf][order[:, 0] // each]}

    @classmethod
    def fold_alpha(cls, tensors: AdapterTensors) -> AdapterTensors:
        no_dora(cls, tensors)
        options, leaf = cls.read(tensors), _first_leaf(tensors)
        assert options is not None
        first = tensors[leaf]
        return {
            **{k: t for k, t in tensors.items() if k != ALPHA},
            leaf: (first.float() * options.scale).to(first.dtype),
        }

    def _first(self) -> Tensor:
        """(rows, columns)"""
        return self.lokr_w1_a @ self.lokr_w1_b if self.form.thin_first else self.lokr_w1

    def _second(self) -> list[Tensor]:
        """The second factor's steps, as they act on an input: (out, in) each, one of a convolution with the kernel."""
        if not self.form.thin:
            return [self.lokr_w2]
        if self.form.tucker:
            return [self.lokr_w2_b, self.lokr_t2, self.lokr_w2_a.T]
        kernel = self.operation.shape[2:]
        down = self.lokr_w2_b
        return [down.view(len(down), -1, *kernel) if kernel else down, self.lokr_w2_a]


def _first_leaf(tensors: AdapterTensors) -> str:
    """The tensor along whose rows those of the first factor lie."""
    return W1 if W1 in tensors else W1A


def _second_rows(tensors: AdapterTensors) -> int:
    """Rows of the second factor."""
    return tensors[W2A].shape[1] if T2 in tensors else len(tensors[W2 if W2 in tensors else W2A])


def _cheapest_turn(form: Form, shape: Sequence[int], steps: Sequence[Sequence[int]]) -> int:
    """Before which of the second factor's steps (their shapes) the first one is cheapest, by multiplications for a
    pixel or token and numbers that are written between; -1: the built product is no dearer."""
    widths = [shape[1] // form.columns, *(step[0] for step in steps)]

    def work(turn: int) -> int:
        second = sum((form.columns if i < turn else form.rows) * math.prod(step) for i, step in enumerate(steps))
        written = form.columns * sum(widths[1 : turn + 1]) + form.rows * sum(widths[turn:]) - shape[0]
        if len(shape) == 2:  # the first factor's channels are not the last ones: its input and output are turned
            written += (form.columns + form.rows) * widths[turn]
        return second + form.rows * form.columns * widths[turn] + WRITTEN * written

    turn = min(range(len(widths)), key=work)
    return -1 if math.prod(shape) <= work(turn) else turn


def _product(steps: Sequence[Tensor]) -> Tensor:
    """The second factor: (out, in) or (out, in, *kernel)."""
    whole = steps[0]
    for step in steps[1:]:
        whole = torch.einsum("or..., ri... -> oi...", step, whole)
    return whole


def _kronecker(first: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """The built product, (out, in, *kernel)."""
    second = _product(steps)
    return torch.kron(first.view(*first.shape, *(1 for _ in second.shape[2:])), second)


ADAPTER = LoKr
