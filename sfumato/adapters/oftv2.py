"""OFT on a layer's input, "OFTv2" (arXiv:2506.19847), as PEFT and OneTrainer have it: blocks of the input are turned.

In a file: `oft_R.weight` (k, n (n - 1) / 2), the upper triangles of Q of each block of n inputs, row by row.
W' = W R^T with R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, the first 5 terms of (I + Q) (I - Q)^-1; with
`use_cayley_neumann=False` the exact (I - Q) (I + Q)^-1. PEFT's two ways turn into opposite directions, and its files do
not say which one it was, so the exact one is marked by `oft_R.exact` here. The inputs of a convolution larger than 1x1
are its patches, (channels, height, width); PEFT has that when it merges, while its forward adds overlapping patches up,
and is not what was merged. ComfyUI reads "oft", and not this form, whatever the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters.base import Adapter, LayerOptions, device_of
from sfumato.adapters.oft import OFT
from sfumato.adapters.operation import Operation
from sfumato.errors import UserError
from sfumato.formats.dialect import AdapterTensors
from sfumato.tensors.algebra import cayley

WEIGHT, EXACT, SCALED = "oft_R.weight", "oft_R.exact", "oft_R.scaled_oft"


@dataclass(frozen=True, slots=True, kw_only=True)
class OFTv2Options(LayerOptions):
    use_cayley_neumann: bool = True
    """The first 5 terms of a series in place of the exact rotation: faster, and as good while the angles are small."""


class OFTv2(Adapter):
    """`layer(x + multiplier * (R^T x - x))`.

    network_dim is the size of a block; where that does not divide a layer's inputs, the divisor nearest to it."""

    Options: ClassVar[type[LayerOptions]] = OFTv2Options
    supports = frozenset({"module_dropout"})
    has_alpha = False
    any_rank = True
    options: OFTv2Options

    def __init__(self, base: nn.Module, options: OFTv2Options, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        self.operation = Operation(base)
        self.patches = self.operation.shape[2:] not in ((), (1, 1))
        assert isinstance(base.weight, Tensor)
        inputs = base.weight[0].numel()
        self.size = _nearest(inputs, options.rank)
        elements = self.size * (self.size - 1) // 2
        self.oft_R = nn.ParameterDict({"weight": torch.zeros(inputs // self.size, elements, device=device_of(base))})

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> OFTv2Options | None:
        if WEIGHT not in tensors or not tensors.keys() <= {WEIGHT, EXACT, SCALED}:
            return None
        return OFTv2Options(
            rank=(1 + isqrt(1 + 8 * tensors[WEIGHT].shape[1])) // 2, use_cayley_neumann=EXACT not in tensors
        )

    def adapt_input(self, x: Tensor) -> Tensor:
        if self.patches:
            return x
        return self.add(x, OFT.turn(x, self.rotations().to(x.dtype), self.operation.channels))

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        if not self.patches:
            return y
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # Turning the weight is less work than turning every patch.
        return self.add(y, self.operation(x, self.delta_weight(weight).to(x.dtype)))

    def delta_weight(self, weight: Tensor) -> Tensor:
        return OFT.turn(weight.float().flatten(1), self.rotations().mT, -1).view(weight.shape)

    def rotations(self) -> Tensor:
        """R - I of each block, (k, n, n), in fp32."""
        weight = self.oft_R["weight"].float()
        upper = weight.new_zeros(len(weight), self.size, self.size)
        row, column = torch.triu_indices(self.size, self.size, 1, device=weight.device)
        upper = upper.index_put((torch.arange(len(weight), device=weight.device)[:, None], row, column), weight)
        q = upper - upper.mT
        if not self.options.use_cayley_neumann:
            return cayley(-q)
        with torch.autocast(weight.device.type, enabled=False):
            square = q @ q
            series: Tensor = 2 * q + 2 * square + (2 * q + square) @ square
        return series

    def tensors(self) -> AdapterTensors:
        exact = {} if self.options.use_cayley_neumann else {EXACT: torch.tensor(1.0)}
        return {WEIGHT: self.oft_R["weight"].detach(), **exact}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        given = self.own_form(tensors)
        if given.pop(EXACT, None) is not None and self.options.use_cayley_neumann:
            raise UserError(f"{self.name}: the file's rotations are exact ones; set use_cayley_neumann=False")
        own = self.oft_R["weight"]
        if len(given.get(WEIGHT, own)) == 1:  # all blocks share one (PEFT's block_share)
            given[WEIGHT] = given[WEIGHT].expand(len(own), -1)
        super().load_tensors(given)

    # The tensors of a file: they belong to all output rows.

    @classmethod
    def own_form(cls, tensors: Mapping[str, Tensor]) -> AdapterTensors:
        """OneTrainer's scaled form has its factor multiplied in."""
        given = dict(tensors)
        if given.pop(SCALED, None) is not None:
            given[WEIGHT] = given[WEIGHT] / given[WEIGHT].shape[1] ** 0.5
        return given

    @classmethod
    def row_count(cls, tensors: AdapterTensors) -> int:
        return 0  # whatever their number

    @classmethod
    def join(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        return cls.shared(pieces, rows)

    @classmethod
    def move_rows(cls, tensors: AdapterTensors, move: Callable[[Tensor], Tensor]) -> AdapterTensors:
        return tensors

    @classmethod
    def fold_alpha(cls, tensors: AdapterTensors) -> AdapterTensors:
        return tensors


def _nearest(inputs: int, size: int) -> int:
    """The divisor of `inputs` nearest to `size`, the smaller one of two, as PEFT has it. Errors: `UserError` for 1."""
    found = min((d for d in range(1, inputs + 1) if inputs % d == 0), key=lambda d: (abs(d - size), d))
    if found == 1:
        raise UserError(
            f"network_dim {size}: a layer of {inputs} inputs has no blocks of more than 1 and about so many; choose "
            "another one, or leave the layer out"
        )
    return found


ADAPTER = OFTv2
