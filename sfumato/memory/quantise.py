"""Frozen layers whose weight is kept in fewer bits: which they are, and what they are computed with.

A layer stays where and what it is, hooks and names included; its class becomes a subclass that has codes in place of
the weight. `layer.weight` is still there: made of the codes each time that it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from sfumato.tensors.stored import Format, Parts, Wide

PIECE = 1 << 16
"""Numbers that are quantised at once, as many as are read at once: buffers of some MB leave holes in the heap."""


class Rows(Protocol):
    """A tensor of which rows are read as they are asked for."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def is_meta(self) -> bool: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Stored(nn.Module):
    """A layer whose weight is stored in `format`; mixed into its class by `store`."""

    format: Format
    candidates: tuple[Format, ...]
    """Formats that a weight may be stored in, the smallest first."""
    budget: float | None
    """Of the relative error: the first format within it is taken, or none; None: the first of all."""
    shape: torch.Size
    """Of the weight."""
    dtype: torch.dtype
    """Of the weight, as everything else sees it."""
    error: Tensor | None
    """() fp32: norm of what was lost / norm of the weight, of the last weight that was put in; None: not known, as in
    files that are quantised already."""
    norms: tuple[Tensor, Tensor] | None
    """(out,) and (in,) fp32: those of the rows and of the columns of that weight before, for DoRA, whose magnitudes are
    those of the weight that the adapter will stand on; None: that of the codes is the weight."""

    @property
    def weight(self) -> Tensor:
        """The weight, made anew: to change it, set it."""
        return self.weight_in(self.dtype)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        self.put(weight)

    @property
    def parts(self) -> dict[str, Tensor]:
        """What is stored."""
        return {name: cast(Tensor, self._buffers[f"weight_{name}"]) for name in self.format.names}

    @torch.no_grad()
    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in a number format."""
        return self.format.dequantise(self.parts, self.shape, dtype)

    @torch.no_grad()
    def put(self, weight: Tensor | Rows, dtype: torch.dtype | None = None) -> None:
        """Quantise a weight and hold that. `dtype`: what everything else is to see; None: that of the weight."""
        self.dtype = dtype or weight.dtype
        if weight.is_meta:  # nothing is known of the error: the most that it may take
            self.hold(self.candidates[-1], self.candidates[-1].outline(self.shape))
            return
        for format in self.candidates if self.budget is None else (*self.candidates, Wide(self.dtype)):
            parts, error, norms = quantised(format, weight)
            if self.budget is None or error <= self.budget:
                break
        self.hold(format, parts)
        self.error, self.norms = error, norms

    def hold(self, format: Format, parts: Parts) -> None:
        """Have these as what is stored."""
        for name in self.format.names:
            self._buffers.pop(f"weight_{name}", None)
        self.format, self.error, self.norms = format, None, None
        for name in format.names:
            self.register_buffer(f"weight_{name}", parts[name], persistent=False)

    # Others know a net by the names of its tensors: there the weight stands without values, and putting one in
    # quantises it.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}weight"] = torch.empty(self.shape, dtype=self.dtype, device="meta")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *more: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        super()._load_from_state_dict({k: t for k, t in state_dict.items() if t is not weight}, prefix, *more)  # type: ignore[no-untyped-call]
        if weight is not None:
            self.put(weight)


def quantised(format: Format, weight: Tensor | Rows) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """What a weight becomes, the relative error, and `Stored.norms`; some rows at a time, so that little is held
    meanwhile."""
    rows = max(1, PIECE // math.prod(weight.shape[1:]))
    # Made first: between buffers of some MB that come and go it would leave holes in the heap.
    parts = {n: torch.empty_like(t, device=weight.device) for n, t in format.outline(weight.shape).items()}
    lost, whole = torch.zeros(2, device=weight.device)
    by_row, by_column = (torch.zeros(n, device=weight.device) for n in weight.shape[:2])
    for start in range(0, weight.shape[0], rows):
        exact = weight[start : start + rows].float()
        piece = format.quantise(exact)
        for name, t in piece.items():
            (parts[name] if name in format.common else parts[name][start : start + rows]).copy_(t)
        lost += (format.dequantise(piece, exact.shape, torch.float32) - exact).square_().sum()
        squares = exact.square()
        whole += squares.sum()
        by_row[start : start + rows] = torch.linalg.vector_norm(exact.flatten(1), dim=1)
        by_column += squares.sum([d for d in range(exact.ndim) if d != 1])
    error = (lost / whole.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
    return parts, error, (by_row, by_column.sqrt_())


class StoredLinear(Stored, nn.Linear):
    """A linear layer. In the backward pass the weight is made again: nothing as wide as it is kept in between."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), computed in autocast's format, or x's."""
        return self.multiply(_as_computed(x))

    def multiply(self, x: Tensor) -> Tensor:
        """The same, computed in x's number format, whatever autocast says."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return self.format.multiply(x, self.parts, self.shape, bias)
        y: Tensor = _Linear.apply(x, bias, self.format, self.shape, *self.parts.values())  # type: ignore[no-untyped-call]
        return y


class StoredConv2d(Stored, nn.Conv2d):
    """A convolution; as `StoredLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (b, in, h, w) -> (b, out, h', w')"""
        x = _as_computed(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        how = (self.stride, self.padding, self.dilation, self.groups)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return self._conv_forward(x, self.weight_in(x.dtype), bias)  # type: ignore[no-any-return]
        y: Tensor = _Conv2d.apply(x, bias, how, self.format, self.shape, *self.parts.values())  # type: ignore[no-untyped-call]
        return y


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias; only x gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, format: Format, shape: torch.Size, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.stored = format, shape
        return format.multiply(x, dict(zip(format.names, parts, strict=True)), shape, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        format, shape = ctx.stored
        dx = format.multiply_back(dy, dict(zip(format.names, ctx.saved_tensors, strict=True)), shape)
        return dx, None, None, None, *[None] * len(format.names)


class _Conv2d(torch.autograd.Function):
    """The convolution of x with the weight, plus bias; only x gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        how: tuple[Any, ...],
        format: Format,
        shape: torch.Size,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.stored = format, shape, x.shape, how
        return F.conv2d(x, _weight(format, parts, shape, x.dtype), bias, *how)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        format, shape, size, how = ctx.stored
        dx = conv2d_input(size, _weight(format, ctx.saved_tensors, shape, dy.dtype), dy, *how)  # type: ignore[no-untyped-call]
        return dx, None, None, None, None, *[None] * len(format.names)


def _weight(format: Format, parts: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return format.dequantise(dict(zip(format.names, parts, strict=True)), shape, dtype)


def _as_computed(x: Tensor) -> Tensor:
    """x in autocast's number format, where that is on."""
    device = x.device.type
    on = not x.is_meta and torch.is_autocast_enabled(device)  # which knows no meta device
    return x.to(torch.get_autocast_dtype(device)) if on else x


@cache
def _stored(kind: type[nn.Module]) -> type[Stored]:
    """The class of stored layers of this class."""
    base = StoredLinear if issubclass(kind, nn.Linear) else StoredConv2d
    own = kind is nn.Linear or kind is nn.Conv2d
    return base if own else cast("type[Stored]", type(f"Stored{kind.__name__}", (kind, base), {}))


def store(layer: nn.Module, *candidates: Format, budget: float | None = None) -> Stored:
    """Have a frozen linear layer or convolution, with values or on the meta device, keep its weight in the first of
    some formats, or in the first whose relative error is within the budget."""
    weight = layer._parameters.pop("weight")
    assert weight is not None and not weight.requires_grad
    layer.__class__ = _stored(type(layer))  # type: ignore[arg-type]
    stored = cast(Stored, layer)
    stored.shape, stored.dtype, stored.format = weight.shape, weight.dtype, candidates[0]
    stored.candidates, stored.budget = candidates, budget
    stored.put(weight.detach())
    return stored


def stored_layers(net: nn.Module) -> dict[str, Stored]:
    """Module path -> layer, of those in a net that are stored in fewer bits."""
    return {path: layer for path, layer in net.named_modules() if isinstance(layer, Stored)}
