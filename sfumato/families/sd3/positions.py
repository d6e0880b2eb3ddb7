"""Where images lie while training: places in the model's table of positions, or positions of their own that fit their
size."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.tensors.random import SampleRandom

SPAN = 16.0
"""What the rows and columns of an image of 1024 x 1024 are counted up to in the published tables."""
ROOM = 1.5
"""A table of positions of its own has this times an image's side, within which images may lie anywhere (as in
sd-scripts)."""


def places(patches: Tensor, side: Tensor | int, rate: float, rng: SampleRandom) -> Tensor:
    """(b, 2) row and column of each image's first patch in a table: anywhere, by chance, else that of the middle.

    `patches` (b, 2): rows and columns of the images; `side`: of the table, one for both or (b, 2).
    """
    room = side - patches
    anywhere = (rng.uniform("position", (2,)).to(room.device) * (room + 1)).long()
    return torch.where((rng.uniform("position crop") < rate)[:, None].to(room.device), anywhere, room // 2)


def scaled(patches: Tensor, rate: float, rng: SampleRandom) -> Tensor:
    """(b, 3) row and column of each image's first patch and the step from patch to patch, so that the whole of an image
    spans what one of 1024 x 1024 does.

    So small images have the positions of a large one, not those of its middle (sd-scripts' enable_scaled_pos_embed, by
    KohakuBlueleaf). An image's scale follows from its own area. `patches`, `rate`: as for `places`.
    """
    side = patches.prod(1, keepdim=True).sqrt()  # (b, 1) of the square of the same area
    table = torch.maximum((ROOM * side).long(), patches)  # (b, 2), for a long image as long as itself
    first = places(patches, table, rate, rng) - (table - side) / 2
    return torch.cat([first, torch.ones_like(side)], 1) * (SPAN / side)


def embedded(where: Tensor, h: int, w: int, channels: int) -> Tensor:
    """`scaled` (b, 3) -> (b, h * w, channels) positions of h x w patches, fp32."""
    first, step, half = where[:, :2], where[:, 2:], channels // 2
    rows, columns = (first[:, i, None] + step * torch.arange(n, device=where.device) for i, n in enumerate((h, w)))
    x, y = sines(columns, half)[:, None].expand(-1, h, -1, -1), sines(rows, half)[:, :, None].expand(-1, -1, w, -1)
    return torch.cat([x, y], -1).flatten(1, 2)


def sines(at: Tensor, channels: int) -> Tensor:
    """(b, n) -> (b, n, channels): sines, then cosines, at rates from 1 down to 1 / 10,000."""
    rates = 10_000 ** -(torch.arange(channels // 2, dtype=torch.float64, device=at.device) / (channels // 2))
    angles = at[..., None].double() * rates
    return torch.cat([angles.sin(), angles.cos()], -1).float()
