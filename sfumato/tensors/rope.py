"""Rotary position embedding over several axes (Su et al. 2021, arXiv:2104.09864).

Real numbers alone, so that compilers see through it; angles are fp32, whatever the net runs in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rope(positions: Tensor, widths: Sequence[int], theta: float) -> Tensor:
    """Cosines and sines of every position, made once a forward: (..., n, axes) -> (2, ..., n, sum(widths) / 2), fp32.

    `widths`: channels of a head that each axis turns, even numbers; on an axis of width w the pair i turns by
    position * theta^(-2i / w).
    """
    angles = []
    for axis, width in enumerate(widths):
        powers = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
        angles.append(positions[..., axis, None].float() * theta**-powers)
    turned = torch.cat(angles, -1)
    return torch.stack([turned.cos(), turned.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (..., n, d) with its neighbouring channels 2i and 2i + 1 turned as a pair; `table` as `rope` gives it. Shaped
    and typed as x."""
    cos, sin = table
    a, b = torch.unflatten(x.float(), -1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """The same with the channels i and i + d / 2 as a pair."""
    cos, sin = table
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
