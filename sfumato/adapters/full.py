"""The whole difference of a layer's weight and bias, LyCORIS' "full": `diff` and `diff_b` in a file.

A file without `diff_b` leaves the bias as it is. LyCORIS and ComfyUI also know `w_norm` and `b_norm`, of layers
that are neither linear nor convolutions; those have no adapters here, and their keys are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.adapters.base import Adapter, LayerOptions, as_input, device_of

DIFF, DIFF_B = "diff", "diff_b"


class Full(Adapter):
    """`y + multiplier * (diff x + diff_b)`."""

    supports = frozenset({"rank_dropout", "module_dropout"})
    has_alpha = False
    has_rank = False
    rows: ClassVar[Mapping[str, int]] = {DIFF: 0, DIFF_B: 0}
    neutral: ClassVar[Mapping[str, float]] = {DIFF: 0.0, DIFF_B: 0.0}

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        assert isinstance(base.weight, Tensor)
        self.diff = nn.Parameter(torch.zeros(base.weight.shape, device=device_of(base)))
        bias = base.bias
        self.diff_b = (
            nn.Parameter(torch.zeros(bias.shape, device=device_of(base))) if isinstance(bias, Tensor) else None
        )

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> LayerOptions | None:
        return LayerOptions() if DIFF in tensors and tensors.keys() <= {DIFF, DIFF_B} else None

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        x = as_input(x, self.diff)
        if isinstance(layer, nn.Conv2d):
            delta = layer._conv_forward(x, self.diff, self.diff_b)
        else:
            delta = functional.linear(x, self.diff, self.diff_b)
        return self.add(y, self.drop_rows(delta, 1 if isinstance(layer, nn.Conv2d) else -1))

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.diff.float()

    def needs_weight(self) -> bool:
        return False

    def delta_bias(self, bias: Tensor) -> Tensor | None:
        return None if self.diff_b is None else self.diff_b.float()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self.diff_b is not None and DIFF_B not in tensors:
            tensors = {**tensors, DIFF_B: torch.zeros_like(self.diff_b)}
        super().load_tensors(tensors)


ADAPTER = Full
