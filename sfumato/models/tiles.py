"""Large pictures through a VAE in overlapping tiles, which spares memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 4
"""Neighbours share this part of a tile's side, a quarter, or more."""


def in_tiles(net: Callable[[Tensor], Tensor], x: Tensor, side: int, into: int, out: int) -> Tensor:
    """`net(x)`, x (b, c, H, W) -> (b, d, h, w), made of tiles of `side` cells that fade into one another.

    A cell, the pixel of the smaller picture, is `into` pixels of x wide and `out` of the result: 8 and 1 for an encoder
    that makes one pixel of 8. What fits into a tile goes through whole.
    """
    rows, columns = x.shape[-2] // into, x.shape[-1] // into
    if max(rows, columns) <= side:
        return net(x)
    high, wide = min(rows, side), min(columns, side)
    fade = side // OVERLAP * out
    weight = _ramp(high * out, fade, x.device)[:, None] * _ramp(wide * out, fade, x.device)  # (h, w) of a tile
    total, weights = None, torch.zeros(rows * out, columns * out, device=x.device)
    for top in _starts(rows, high):
        for left in _starts(columns, wide):
            tile = net(x[..., top * into : (top + high) * into, left * into : (left + wide) * into]).float()
            if total is None:
                total = tile.new_zeros(*tile.shape[:2], *weights.shape)
            place = (..., slice(top * out, (top + high) * out), slice(left * out, (left + wide) * out))
            total[place] += tile * weight
            weights[place] += weight
    assert total is not None
    return total / weights


def _starts(cells: int, side: int) -> list[int]:
    """Where tiles begin, evenly from one edge to the other."""
    steps = math.ceil((cells - side) / (side - side // OVERLAP))
    return [round(i * (cells - side) / steps) for i in range(steps + 1)] if steps else [0]


def _ramp(length: int, fade: int, device: torch.device) -> Tensor:
    """(length,) weights: up from nearly 0 to 1 over `fade` pixels at the start, and down again at the end."""
    inside = torch.arange(length, device=device) + 0.5
    return (torch.minimum(inside, length - inside) / fade).clamp(max=1)
