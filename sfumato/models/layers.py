"""Layers that nets of several families are made of, sizes read off their tensors' shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


def linear(shapes: Shapes, name: str) -> nn.Linear:
    """The linear layer of this name."""
    out, into = shapes[f"{name}.weight"]
    return nn.Linear(into, out, bias=f"{name}.bias" in shapes)


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """t (b,) -> (b, channels), fp32: cosines, then sines, of t at rates from 1 down to 1 / 10,000.

    In the references' order of operations: for large t another rounding of the rates would be seen in the cosines.
    """
    half = channels // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def count_layers(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the group of `pattern` finds at the start of the names."""
    return len({m[1] for name in names if (m := re.match(pattern, name))})
