"""BOFT: a layer's output rows are turned in blocks, again and again in orders of a butterfly (arXiv:2311.06243), as
LyCORIS has it.

In a file: `oft_blocks` (m, k, n, n), whose `[i]` turns blocks of rows that lie 2^i * n / 2 apart; Q, R, `rescale` and
the constraint are OFT's, and files are written as OFT's are; ComfyUI reads none without alpha. LyCORIS and ComfyUI
apply a multiplier other than 1 to each turn, here it acts on the change as a whole. PEFT's BOFT has other tensors
(`boft_R`, `boft_s`), which turn the layer's input: they are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.adapters.base import LayerOptions
from sfumato.adapters.oft import BLOCKS, OFT, RESCALE, RotationOptions
from sfumato.errors import UserError
from sfumato.formats.dialect import ALPHA, AdapterTensors


class BOFT(OFT):
    """`y + multiplier * (rescale * R_m ... R_1 (y - bias) - (y - bias))`.

    network_dim is the most rows of a block; a layer that has none so small gets its smallest."""

    Options: ClassVar[type[LayerOptions]] = RotationOptions
    kohya_targets = ()

    @classmethod
    def kohya_options(cls, alpha: float) -> Mapping[str, Any]:
        """sd-scripts has no such module."""
        return {}

    @staticmethod
    def shape(rows: int, options: RotationOptions) -> tuple[int, ...]:
        """(m, k, n, n), n even and k a power of 2: the largest blocks of up to `rank` rows that there are, or the
        smallest. Errors: `UserError` for an odd number of rows."""
        if rows % 2:
            raise UserError(f"BOFT turns pairs of rows, and a layer has {rows}: leave the layer out")
        least = rows // (rows & -rows) * 2  # the odd factor, twice
        size = least
        while size * 2 <= min(options.rank, rows):
            size *= 2
        count = rows // size
        return ((count - 1).bit_count() + 1, count, size, size)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> RotationOptions | None:
        if BLOCKS not in tensors or not tensors.keys() <= {BLOCKS, RESCALE, ALPHA} or tensors[BLOCKS].ndim != 4:
            return None
        return RotationOptions(rank=tensors[BLOCKS].shape[-1], rescaled=RESCALE in tensors)

    @staticmethod
    def turn(h: Tensor, rotations: Tensor, rows: int) -> Tensor:
        """What the turns one after another add; R itself acts, where OFT takes its transpose."""
        n = rotations.shape[-1]
        turned = start = h.movedim(rows, -1)
        for i, change in enumerate(rotations):
            apart = 2**i * n // 2
            mixed = turned.reshape(*turned.shape[:-1], -1, 2, apart).transpose(-2, -1)
            blocks = mixed.reshape(-1, len(change), n).transpose(0, 1)
            blocks = torch.baddbmm(blocks, blocks, change.mT).transpose(0, 1)
            turned = blocks.reshape(mixed.shape).transpose(-2, -1).reshape(turned.shape)
        return (turned - start).movedim(-1, rows)

    @classmethod
    def row_count(cls, tensors: AdapterTensors) -> int:
        raise UserError(_WHOLE)

    @classmethod
    def cut(cls, tensors: AdapterTensors, rows: Sequence[int]) -> list[AdapterTensors]:
        raise UserError(_WHOLE)

    @classmethod
    def join(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        raise UserError(_WHOLE)

    @classmethod
    def move_rows(cls, tensors: AdapterTensors, move: Callable[[Tensor], Tensor]) -> AdapterTensors:
        raise UserError(_WHOLE)


_WHOLE = "BOFT mixes all rows of a layer, so it has no exact form for a part of them or for another order"
ADAPTER = BOFT
