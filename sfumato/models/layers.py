"""Layers that nets of several families are made of, sizes read off their tensors' shapes."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.memory.quantise import StoredLinear
from sfumato.models.detection import Shapes as Shapes
from sfumato.tensors.meta import without_values

Net = TypeVar("Net", bound="Denoiser")
GELU = partial(nn.GELU, approximate="tanh")
EPS = 1e-6
"""Of every norm, where nothing else is published."""


class Denoiser(nn.Module):
    """A net that reads its sizes off the shapes of a checkpoint's tensors: a tiny one takes the same path as a real."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()

    @classmethod
    def of(cls: type[Net], shapes: Shapes) -> Net:
        """A net without values (on the meta device) for tensors of these shapes.

        Errors: `UserError` if a tensor that sizes are read from is missing, or blocks are not numbered 0, 1, 2 ...
        """
        try:
            with without_values():
                return cls(shapes)
        except KeyError as missing:
            raise UserError(
                f"the denoiser lacks the tensor {missing}: the file is incomplete or of another kind"
            ) from None


def linear(shapes: Shapes, name: str) -> nn.Linear:
    """The linear layer of this name."""
    out, into = shapes[f"{name}.weight"]
    return nn.Linear(into, out, bias=f"{name}.bias" in shapes)


class WideLinear(nn.Linear):
    """A linear layer that is never computed in fp16, for outputs that pass its range.

    Where the weight is in fp16, or autocast is to fp16, it gives fp32; the sums that pass from block to block are fp32
    with it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        # A stored weight is made anew each time that it is asked for.
        stored = self if isinstance(self, StoredLinear) else None
        if not in_fp16(x.device, self.weight.dtype if stored is None else stored.dtype):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            if stored is not None:
                return stored.multiply(x.float())
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def in_fp16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer with a weight in `dtype` is computed in fp16 there: the weight is, or autocast has it so."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)  # which knows no meta device
    return (torch.get_autocast_dtype(device.type) if on else dtype) == torch.float16


class MLP(nn.Sequential):
    """Two linear layers, called by `names`, with an activation between them: (..., n) -> (..., m)."""

    def __init__(
        self, shapes: Shapes, name: str, act: Callable[[], nn.Module] = nn.SiLU, names: tuple[str, str] = ("0", "2")
    ) -> None:
        first, last = (linear(shapes, f"{name}.{part}") for part in names)
        super().__init__(OrderedDict({names[0]: first, "act": act(), names[1]: last}))
        self.in_features = first.in_features


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467), in fp32.

    `name`: what files call the weight.
    """

    def __init__(self, channels: int, name: str = "weight", eps: float = EPS) -> None:
        super().__init__()
        self.name, self.eps, self.channels = name, eps, channels
        self.register_parameter(name, nn.Parameter(torch.ones(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) -> (..., channels)"""
        weight: Tensor = getattr(self, self.name)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (b, n, c) through a layer norm without weights, then scaled and shifted by (b, 1, c)."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def modulation(shapes: Shapes, name: str) -> nn.Module:
    """(b, c) -> (b, n, c): n shifts, scales and gates, by the linear layer of this name behind an activation."""
    out, into = shapes[f"{name}.weight"]
    parts = {
        "act": nn.SiLU(),
        name.rpartition(".")[2]: linear(shapes, name),
        "cut": nn.Unflatten(1, (out // into, into)),
    }
    return nn.Sequential(OrderedDict(parts))


def split_heads(qkv: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused (b, n, 3c) -> q, k, v (b, heads, n, channels)."""
    q, k, v = torch.unflatten(qkv, -1, (3, -1, channels)).permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """t (b,) -> (b, channels), fp32: cosines, then sines, of t at rates from 1 down to 1 / 10,000.

    In the references' order of operations: for large t another rounding of the rates would show in the cosines.
    """
    half = channels // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def numbered(shapes: Shapes, name: str) -> list[str]:
    """`name.0`, `name.1` ... as far as there are tensors below them. Errors: `UserError` for a gap in the numbers."""
    start = f"{name}."
    numbers = (key[len(start) :].partition(".")[0] for key in shapes if key.startswith(start))
    found = {int(number) for number in numbers if number.isdigit()}
    if gaps := sorted(set(range(max(found, default=-1))) - found):
        raise UserError(
            f"the denoiser has {name} up to {max(found)}, but none numbered {', '.join(map(str, gaps))}; "
            "the blocks of a pruned model must be numbered anew, from 0 and without gaps"
        )
    return [f"{name}.{i}" for i in range(len(found))]


def count_layers(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the group of `pattern` finds at the start of the names."""
    return len({m[1] for name in names if (m := re.match(pattern, name))})
