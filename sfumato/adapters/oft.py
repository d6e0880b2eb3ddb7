"""OFT: blocks of a layer's output rows are turned (arXiv:2306.07280), LyCORIS' "diag-oft" and kohya's `networks.oft`.

In a file: `oft_blocks` B (k, n, n), whose Q = B - B^T gives each block of n rows the rotation R = (I + Q) (I - Q)^-1:
W' = R^T W; with `rescaled` a factor per row, `rescale`. The bias stays. `alpha` of LyCORIS and kohya is the
constraint: the norm of all Q is at most alpha times the layer's rows. ComfyUI takes alpha itself for that limit, so
files are written with the limit in the blocks and alpha 0, which is none in both. (To kohya's own scripts alpha 0 is no
rotation at all.) ComfyUI squares a strength other than 1, and leaves `rescale` out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters.base import Adapter, LayerOptions, device_of, without_bias
from sfumato.config.rules import Amount
from sfumato.errors import UserError
from sfumato.formats.dialect import ALPHA, AdapterTensors
from sfumato.tensors.algebra import cayley, factorization, skew

BLOCKS, RESCALE = "oft_blocks", "rescale"
_LEAST = 32
"""Rows of a block that are multiplied together; a smaller one takes as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationOptions(LayerOptions):
    """`rank` is about the size of a block."""

    constraint: Amount = 0.0
    """The norm of Q is at most this times the layer's rows; 0: no limit."""
    rescaled: bool = False
    """Train a factor per output row besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OFTOptions(RotationOptions):
    count_blocks: bool = False
    """network_dim is the number of blocks, as in kohya's networks.oft, not their size."""


class OFT(Adapter):
    """`y + multiplier * (rescale * R^T (y - bias) - (y - bias))`: the layer's output is turned, never its weight.

    network_dim is the most rows of a block, of which there are at least as many as a block has rows (as in LyCORIS);
    in kohya's networks.oft their number. A multiplier acts on the change as a whole, as in LyCORIS.
    """

    Options: ClassVar[type[LayerOptions]] = OFTOptions
    aliases = ("diag-oft",)
    kohya_targets: ClassVar[tuple[str, ...]] = ("attention",)
    supports = frozenset({"rank_dropout", "module_dropout"})
    has_alpha = False
    any_rank = True
    shaping = frozenset({"count_blocks", "rescaled"})
    options: RotationOptions
    rescale: nn.Parameter | None

    def __init__(self, base: nn.Module, options: RotationOptions, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        assert isinstance(base.weight, Tensor)
        rows, place = len(base.weight), device_of(base)
        self.oft_blocks = nn.Parameter(torch.zeros(self.shape(rows, options), device=place))
        self.register_parameter(RESCALE, None)
        if options.rescaled:
            self.rescale = nn.Parameter(torch.ones(rows, *[1] * (base.weight.ndim - 1), device=place))
        self.register_buffer(ALPHA, torch.tensor(0.0))

    @staticmethod
    def shape(rows: int, options: RotationOptions) -> tuple[int, ...]:
        """Of `oft_blocks`, for a layer of so many rows. Errors: `UserError` where that cannot be."""
        if isinstance(options, OFTOptions) and options.count_blocks:
            if rows % options.rank:
                raise UserError(
                    f"network_dim {options.rank}: {rows} rows of a layer do not share out over so many blocks"
                )
            return (options.rank, rows // options.rank, rows // options.rank)
        size, count = factorization(rows, options.rank)
        if size == 1:
            raise UserError(
                f"network_dim {options.rank}: a layer of {rows} rows has no blocks of more than 1 and up to so many "
                "rows; choose another one, or leave the layer out"
            )
        return (count, size, size)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> RotationOptions | None:
        tensors = _in_one(tensors)
        if BLOCKS not in tensors or not tensors.keys() <= {BLOCKS, RESCALE, ALPHA} or tensors[BLOCKS].ndim != 3:
            return None
        return OFTOptions(rank=len(tensors[BLOCKS]), rescaled=RESCALE in tensors, count_blocks=True)

    @classmethod
    def kohya_options(cls, alpha: float) -> Mapping[str, Any]:
        """network_dim counts blocks, and network_alpha is the constraint."""
        return {"count_blocks": True, "constraint": alpha}

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        rows = 1 if isinstance(layer, nn.Conv2d) else -1
        return self.add(y, self.drop_rows(self.change(without_bias(y, layer), rows), rows))

    def change(self, h: Tensor, rows: int) -> Tensor:
        """What turning and rescaling adds to the layer's rows, which are dimension 1 or -1 of h; in h's dtype."""
        delta = self.turn(h, self.rotations().to(h.dtype), rows)
        if self.rescale is None:
            return delta
        factor = self.rescale.float().view(-1, *[1] * (h.ndim - 2 if rows == 1 else 0))
        return delta * factor.to(h.dtype) + h * (factor - 1).to(h.dtype)

    def rotations(self) -> Tensor:
        """R - I of each block, in fp32."""
        return cayley(skew(_limited(self.oft_blocks, self._limit())))

    @staticmethod
    def turn(h: Tensor, rotations: Tensor, rows: int) -> Tensor:
        """What R^T adds to dimension `rows` (1 or -1) of h; `rotations`: R - I of each block."""
        blocks = _together(rotations)
        k, n, _ = blocks.shape
        if rows == 1:
            return (blocks.mT @ h.reshape(len(h), k, n, -1)).view(h.shape)
        return torch.bmm(h.reshape(-1, k, n).transpose(0, 1), blocks).transpose(0, 1).reshape(h.shape)

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.change(weight.float().flatten(1)[None], 1).view(weight.shape)

    @torch.no_grad()
    def scale_norm(self, limit: float) -> tuple[Tensor, Tensor]:
        """The norm of the blocks, not of the change, as in LyCORIS."""
        norm = self.oft_blocks.float().norm()
        ratio = (limit / norm).clamp(max=1.0)
        self.oft_blocks.mul_(ratio)
        return norm * ratio, ratio < 1.0

    def tensors(self) -> AdapterTensors:
        return {**super().tensors(), BLOCKS: _limited(self.oft_blocks.detach(), self._limit())}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        given = self.own_form(tensors)
        if self.rescale is not None:
            given.setdefault(RESCALE, torch.ones_like(self.rescale))
        super().load_tensors(given)

    def _limit(self) -> float:
        return self.options.constraint * self.oft_blocks.shape[-2] * self.oft_blocks.shape[-3]

    # The tensors of a file.

    @classmethod
    def own_form(cls, tensors: Mapping[str, Tensor]) -> AdapterTensors:
        given = _in_one(tensors)
        blocks = given[BLOCKS]
        limit = float(given.get(ALPHA, 0.0)) * blocks.shape[-2] * blocks.shape[-3]
        return {**given, BLOCKS: _limited(blocks, limit), ALPHA: torch.tensor(0.0)}

    @classmethod
    def row_count(cls, tensors: AdapterTensors) -> int:
        return tensors[BLOCKS].shape[0] * tensors[BLOCKS].shape[1]

    @classmethod
    def cut(cls, tensors: AdapterTensors, rows: Sequence[int]) -> list[AdapterTensors]:
        size = tensors[BLOCKS].shape[1]
        if any(n % size for n in rows):
            raise UserError(f"OFT in blocks of {size} rows has no exact form for pieces of {_listed(rows)} rows")
        shares = {BLOCKS: [n // size for n in rows], RESCALE: list(rows)}
        parts = {leaf: torch.split(t, shares[leaf]) for leaf, t in tensors.items() if leaf in shares}
        return [{leaf: parts[leaf][i] if leaf in parts else t for leaf, t in tensors.items()} for i in range(len(rows))]

    @classmethod
    def join(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        """In blocks of the least size that those of all pieces fit into."""
        size = lcm(*(p[BLOCKS].shape[1] for p in pieces.values()))
        if any(n % size for n in rows):
            raise UserError(f"OFT of pieces of {_listed(rows)} rows has no exact form in blocks of one size ({size})")
        like = pieces[min(pieces)][BLOCKS]
        out = {
            BLOCKS: torch.cat(
                [
                    _grown(pieces[i][BLOCKS], size) if i in pieces else like.new_zeros(n // size, size, size)
                    for i, n in enumerate(rows)
                ]
            ),
            ALPHA: torch.tensor(0.0),
        }
        factors = {i: p[RESCALE] for i, p in pieces.items() if RESCALE in p}
        if factors:
            ones = next(iter(factors.values()))[:1]
            out[RESCALE] = torch.cat(
                [factors.get(i, torch.ones_like(ones).expand(n, *ones.shape[1:])) for i, n in enumerate(rows)]
            )
        return out

    @classmethod
    def move_rows(cls, tensors: AdapterTensors, move: Callable[[Tensor], Tensor]) -> AdapterTensors:
        """Exact where the rows of a block stay together."""
        blocks = tensors[BLOCKS]
        k, n, _ = blocks.shape
        order = move(torch.arange(k * n)[:, None]).view(k, n)
        source, within = order[:, 0] // n, order % n
        if not torch.equal(order // n, source[:, None].expand(k, n)):
            raise UserError(
                f"OFT in blocks of {n} rows has no exact form where rows of a block change places with others"
            )
        moved = {BLOCKS: blocks[source[:, None, None], within[:, :, None], within[:, None, :]]}
        return tensors | moved | ({RESCALE: move(tensors[RESCALE])} if RESCALE in tensors else {})


def _limited(blocks: Tensor, limit: float) -> Tensor:
    """Blocks whose Q has at most this norm; 0: any."""
    if not limit:
        return blocks
    # As in LyCORIS, and for a norm of 0 whose gradient is one.
    ratio: Tensor = (limit / (torch.linalg.vector_norm(skew(blocks)) + 1e-8)).clamp(max=1.0)
    return blocks * ratio.to(blocks.dtype)


def _in_one(tensors: Mapping[str, Tensor]) -> AdapterTensors:
    """Tensors whose blocks stand in one: kohya's `networks.oft_flux` has `oft_blocks.0` and so on, each of its own
    rows."""
    parts = sorted(leaf for leaf in tensors if leaf.startswith(f"{BLOCKS}."))
    rest = {leaf: t for leaf, t in tensors.items() if leaf not in parts}
    if not parts or any(tensors[leaf].ndim != 3 for leaf in parts):
        return rest
    alpha = {ALPHA: rest[ALPHA]} if ALPHA in rest else {}
    pieces = {i: OFT.own_form({BLOCKS: tensors[leaf], **alpha}) for i, leaf in enumerate(parts)}
    return rest | OFT.join(pieces, [OFT.row_count(piece) for piece in pieces.values()])


def _together(blocks: Tensor) -> Tensor:
    """The same in larger blocks where they are small: those take as long to multiply."""
    k, n, _ = blocks.shape
    return _grown(blocks, n * max([1] + [d for d in range(2, _LEAST // n + 1) if k % d == 0]))


def _grown(blocks: Tensor, size: int) -> Tensor:
    """The same in blocks of `size`, a multiple of theirs: each has several of them on its diagonal."""
    k, n, _ = blocks.shape
    each = size // n
    if each == 1:
        return blocks
    eye = torch.eye(each, dtype=blocks.dtype, device=blocks.device)
    return (blocks.view(-1, each, n, 1, n) * eye.view(1, each, 1, each, 1)).reshape(k // each, size, size)


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows))


ADAPTER = OFT
