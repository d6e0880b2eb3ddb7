"""(IA)3: each channel of a layer is scaled by a learned factor (arXiv:2205.05638), as LyCORIS has it.

In a file: `weight`, the factors less 1, (c,) or (1, c, 1, 1), and `on_input`, 1 where they act on the layer's input.
They scale the weight alone, so the bias stays as it is; LyCORIS agrees except in its bypass mode, which scales the bias
with the output. PEFT's `ia3_l` (the factors themselves) scales the bias too: it is read where there is none to scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters.base import Adapter, LayerOptions, device_of, without_bias
from sfumato.errors import UserError
from sfumato.formats.dialect import AdapterTensors

PEFT = "ia3_l"


@dataclass(frozen=True, slots=True, kw_only=True)
class IA3Options(LayerOptions):
    train_on_input: bool = False
    """Scale the layer's input instead of its output."""


class IA3(Adapter):
    """`W (x * (1 + multiplier * w)) + bias`, or `(W x) * (1 + multiplier * w) + bias`."""

    Options = IA3Options
    supports = frozenset({"module_dropout"})
    has_alpha = False
    has_rank = False
    shaping = frozenset({"train_on_input"})
    neutral: ClassVar[Mapping[str, float]] = {"weight": 0.0, PEFT: 1.0}
    options: IA3Options
    on_input: Tensor

    def __init__(self, base: nn.Module, options: IA3Options, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        assert isinstance(base.weight, Tensor)
        self._biased = base.bias is not None
        channels = base.weight.shape[1 if options.train_on_input else 0]
        shape = (1, channels, 1, 1) if base.weight.ndim == 4 else (channels,)
        self.weight = nn.Parameter(torch.zeros(shape, device=device_of(base)))
        self.register_buffer("on_input", torch.tensor(int(options.train_on_input)))

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> IA3Options | None:
        if tensors.keys() == {"weight", "on_input"}:
            return IA3Options(train_on_input=_on_input(tensors))
        if tensors.keys() != {PEFT}:
            return None
        if tensors[PEFT].ndim != 2:
            raise UserError("ia3_l of a convolution does not say whether it acts on the input or the output")
        return IA3Options(train_on_input=_on_input(tensors))

    def adapt_input(self, x: Tensor) -> Tensor:
        return self.add(x, x * self.weight.to(x.dtype)) if self.options.train_on_input else x

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        if self.options.train_on_input:
            return y
        return self.add(y, without_bias(y, layer) * self.weight.to(y.dtype))

    def delta_weight(self, weight: Tensor) -> Tensor:
        shape = (1, -1) if self.options.train_on_input else (-1, 1)
        return weight.float() * self.weight.float().view(*shape, *[1] * (weight.ndim - 2))

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if PEFT in tensors:
            if self._biased and not self.options.train_on_input:
                raise UserError(
                    f"{self.name}: PEFT's (IA)3 scales the layer's bias too, and this one's scales the weight alone"
                )
            tensors = {"weight": tensors[PEFT].flatten() - 1, "on_input": self.on_input}
        if bool(tensors.get("on_input", self.on_input)) != self.options.train_on_input:
            raise UserError(f"{self.name}: the file's factors act on the layer's other side; change train_on_input")
        super().load_tensors(tensors)

    @classmethod
    def rows_of(cls, tensors: AdapterTensors) -> Mapping[str, int]:
        if _on_input(tensors):
            return {}
        return {PEFT: 0} if PEFT in tensors else {"weight": int(tensors["weight"].ndim > 1)}

    @classmethod
    def row_count(cls, tensors: AdapterTensors) -> int:
        # Factors of the input belong to all rows, however many there are.
        return 0 if _on_input(tensors) else super().row_count(tensors)

    @classmethod
    def join(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        return cls.shared(pieces, rows) if _on_input(pieces[min(pieces)]) else super().join(pieces, rows)

    @classmethod
    def move_rows(cls, tensors: AdapterTensors, move: Callable[[Tensor], Tensor]) -> AdapterTensors:
        return tensors if _on_input(tensors) else super().move_rows(tensors, move)


def _on_input(tensors: Mapping[str, Tensor]) -> bool:
    if PEFT in tensors:
        return len(tensors[PEFT]) == 1
    return bool(tensors["on_input"])


ADAPTER = IA3
