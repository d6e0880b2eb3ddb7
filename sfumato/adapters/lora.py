"""LoRA: the change is a product of two thin matrices (arXiv:2106.09685); for convolutions, LoCon as LyCORIS has it.

A fused layer's pieces may have pairs of their own. In a file they are one pair: the `down`s stacked, the `up`s on a
diagonal of blocks, and alpha times their number, as the rank has grown so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.adapters.base import Additive, LayerOptions, as_input, device_of, dora_options, init_device, peft_magnitude
from sfumato.errors import UserError
from sfumato.formats.dialect import ALPHA, DORA, DOWN, UP, AdapterTensors


class LoRA(Additive):
    """`y + multiplier * alpha / rank * up(down(x))`. A convolution's `down` has its kernel, stride and padding; its
    `up` is 1x1."""

    aliases = ("locon",)
    supports = frozenset({"dropout", "rank_dropout", "module_dropout"})
    rows: ClassVar[Mapping[str, int]] = {UP: 0}

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        self.lora_down: nn.Linear | nn.Conv2d
        self.lora_up: nn.Linear | nn.Conv2d | Diagonal
        self.lora_down, self.lora_up = _pair(base, options.rank * max(1, len(options.pieces)))
        start = nn.init.kaiming_uniform_(
            torch.empty(self.lora_down.weight.shape, device=init_device(base)), a=math.sqrt(5), generator=generator
        )
        self.lora_down.weight = nn.Parameter(start.to(device_of(base)))
        if options.pieces:
            self.lora_up = Diagonal(options.pieces, options.rank, device_of(base))
            self.alpha *= len(options.pieces)
        else:
            self.lora_up.weight = nn.Parameter(torch.zeros(self.lora_up.weight.shape, device=device_of(base)))

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> LayerOptions | None:
        if tensors.keys() - {ALPHA, DORA} != {DOWN, UP}:
            return None
        rank = len(tensors[DOWN])
        return cls.Options(rank=rank, alpha=float(tensors.get(ALPHA, rank)), **dora_options(tensors))

    def delta(self, x: Tensor) -> Tensor:
        h = self.lora_down(as_input(x, self.lora_down.weight))
        out: Tensor = self.lora_up(self._drop(h) if self.training else h)
        return out

    def product(self, weight: Tensor) -> Tensor:
        up, down = self.lora_up.weight.float(), self.lora_down.weight.float()
        return (up.flatten(1) @ down.flatten(1)).view(weight.shape) * self.options.scale

    def tensors(self) -> AdapterTensors:
        own = super().tensors()
        if isinstance(self.lora_up, Diagonal):
            own = {leaf: t for leaf, t in own.items() if leaf not in self.lora_up.names} | {
                UP: self.lora_up.weight.detach()
            }
        return own

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if not isinstance(self.lora_up, Diagonal):
            return super().load_tensors(tensors)
        given = dict(tensors)
        down, up = given.get(DOWN), given.pop(UP, None)
        blocks = None if down is None or up is None else self.lora_up.blocks_of(up)
        if down is None or blocks is None:
            raise UserError(
                f"{self.name}: the file's adapter is not of {len(self.options.pieces)} separate pieces; leave "
                "split_qkv out"
            )
        given.setdefault(ALPHA, torch.tensor(float(len(down))))
        super().load_tensors(given | dict(zip(self.lora_up.names, blocks, strict=True)))
        self.options = replace(self.options, alpha=float(self.alpha) / len(self.options.pieces))

    @classmethod
    def join_factors(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        """At the same rank when all pieces share one `lora_down`, else at the sum of their ranks."""
        if any(piece.keys() != {DOWN, UP, ALPHA} for piece in pieces.values()):
            raise UserError("only LoRA, with lora_down and lora_up in every piece, can be joined to a fused layer")
        first = pieces[min(pieces)]
        if len(pieces) == len(rows) and all(
            torch.equal(p[DOWN], first[DOWN]) and p[ALPHA] == first[ALPHA] for p in pieces.values()
        ):
            return super().join_factors(pieces, rows)
        rank = sum(len(p[DOWN]) for p in pieces.values())
        up, at = first[UP].new_zeros((sum(rows), rank, *first[UP].shape[2:])), 0
        for i, part in sorted(pieces.items()):
            r = len(part[DOWN])
            up[sum(rows[:i]) : sum(rows[: i + 1]), at : at + r] = part[UP] * (part[ALPHA] / r)
            at += r
        down = torch.cat([p[DOWN] for _, p in sorted(pieces.items())])
        return {DOWN: down, UP: up, ALPHA: torch.tensor(float(rank), dtype=up.dtype)}

    @classmethod
    def fold_alpha(cls, tensors: AdapterTensors) -> AdapterTensors:
        up = tensors[UP]
        scale = float(tensors[ALPHA]) / tensors[DOWN].shape[0] if ALPHA in tensors else 1.0
        folded = {DOWN: tensors[DOWN], UP: (up.float() * scale).to(up.dtype)}
        return folded | ({DORA: peft_magnitude(tensors[DORA])} if DORA in tensors else {})

    def loraplus_parameters(self) -> list[nn.Parameter]:
        return list(self.lora_up.parameters())

    def norm(self) -> Tensor:
        up, down = self.lora_up.weight, self.lora_down.weight
        norm: Tensor = torch.linalg.matrix_norm(up.flatten(1) @ down.flatten(1))
        return norm * abs(self.options.scale)

    @property
    def factors(self) -> int:
        return 2

    def _drop(self, h: Tensor) -> Tensor:
        """(b, ..., rank) or (b, rank, h, w) with the dropouts of one step."""
        if p := self.options.dropout:
            h = h * self.dropout_mask("dropout", p, h.shape, h.device).to(h.dtype) / (1 - p)
        if p := self.options.rank_dropout:
            mask = self.dropout_mask("rank_dropout", p, (h.shape[0], len(self.lora_down.weight)), h.device).to(
                h.dtype
            ) / (1 - p)
            ones = [1] * (h.ndim - 2)
            h = h * mask.view(len(h), *((-1, *ones) if isinstance(self.lora_down, nn.Conv2d) else (*ones, -1)))
        return h


class Diagonal(nn.Module):
    """The `up`s of a layer's pieces: each turns its own share of the ranks into its own rows."""

    def __init__(self, rows: Sequence[int], rank: int, device: torch.device) -> None:
        super().__init__()
        self.blocks = nn.ParameterList([torch.zeros(n, rank, device=device) for n in rows])

    @property
    def weight(self) -> Tensor:
        """(all rows, all ranks), zero off the diagonal of blocks."""
        return _diagonal(self.blocks)

    @property
    def names(self) -> list[str]:
        """What the adapter calls the blocks."""
        return [f"lora_up.blocks.{i}" for i in range(len(self.blocks))]

    def blocks_of(self, weight: Tensor) -> list[Tensor] | None:
        """The blocks of such a weight; None if it has another shape or is not zero elsewhere."""
        if weight.shape != self.weight.shape:
            return None
        rows = torch.split(weight, [len(block) for block in self.blocks])
        blocks = [part.chunk(len(rows), 1)[i] for i, part in enumerate(rows)]
        return blocks if torch.equal(_diagonal(blocks), weight) else None

    def forward(self, h: Tensor) -> Tensor:
        """(..., all ranks) -> (..., all rows)"""
        shares = h.chunk(len(self.blocks), -1)
        return torch.cat(
            [functional.linear(share, block) for share, block in zip(shares, self.blocks, strict=True)], -1
        )


def _diagonal(blocks: Iterable[Tensor]) -> Tensor:
    out: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return out


def _pair(base: nn.Module, rank: int) -> tuple[nn.Linear, nn.Linear] | tuple[nn.Conv2d, nn.Conv2d]:
    """Both factors' layers on the meta device: making them there leaves the global random state alone."""
    if isinstance(base, nn.Linear):
        down = nn.Linear(base.in_features, rank, bias=False, device="meta")
        return down, nn.Linear(rank, base.out_features, bias=False, device="meta")
    if not isinstance(base, nn.Conv2d) or base.groups != 1 or isinstance(base.padding, str):
        raise TypeError(f"LoRA goes on linear layers and on convolutions without groups, not on {base}")
    conv = nn.Conv2d(
        base.in_channels,
        rank,
        (base.kernel_size[0], base.kernel_size[1]),
        (base.stride[0], base.stride[1]),
        (int(base.padding[0]), int(base.padding[1])),
        (base.dilation[0], base.dilation[1]),
        bias=False,
        padding_mode=base.padding_mode,
        device="meta",
    )
    return conv, nn.Conv2d(rank, base.out_channels, 1, bias=False, device="meta")


ADAPTER = LoRA
