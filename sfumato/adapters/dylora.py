"""DyLoRA: a LoRA whose first ranks, however many, are a LoRA of their own (arXiv:2210.07558).

In training each sample sees the ranks up to a random one, and of these the last `unit` learn. A file is a plain LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sfumato.adapters.base import LayerOptions, as_input
from sfumato.adapters.lora import LoRA
from sfumato.config.rules import Count
from sfumato.errors import UserError
from sfumato.tensors.shapes import per_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class DyLoRAOptions(LayerOptions):
    unit: Count = 1
    """Ranks that are learnt together; divides network_dim and conv_dim."""


class DyLoRA(LoRA):
    """LoRA whose first ranks, however many, are a LoRA of their own; a file is a plain LoRA of all.

    Scaled in training by sqrt(rank / ranks seen) besides, as in sd-scripts, where however the multiplier does not act.
    """

    Options: ClassVar[type[LayerOptions]] = DyLoRAOptions
    supports = frozenset({"module_dropout"})

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        assert isinstance(options, DyLoRAOptions)
        if options.rank % options.unit:
            raise UserError(
                f"network_args unit={options.unit}: expected a divisor of network_dim, and of conv_dim; found rank "
                f"{options.rank}"
            )
        if options.pieces:
            raise UserError("DyLoRA has no form with split_qkv: leave it out")

    def delta(self, x: Tensor) -> Tensor:
        rng = self.context.rng
        if not self.training or rng is None:
            return super().delta(x)
        assert isinstance(self.options, DyLoRAOptions)
        unit, rank = self.options.unit, self.options.rank
        last = rng.integers(f"dylora {self.name}", 0, rank // unit, x.device)  # (b,) the unit that learns
        unit_of = torch.arange(rank, device=x.device) // unit
        at = per_sample(last, x).view(-1, 1)
        scale = (rank / (unit * (at + 1))).sqrt()
        x = as_input(x, self.lora_down.weight)
        below = _frozen(self.lora_down, x)
        own = self.lora_down(x)
        below = below * self.per_rank((scale * (unit_of < at)).to(below.dtype), below)
        own = own * self.per_rank((scale * (unit_of == at)).to(own.dtype), own)
        out: Tensor = _frozen(self.lora_up, below) + self.lora_up(own)
        return out


def _frozen(factor: nn.Module, x: Tensor) -> Tensor:
    """x through a factor that gets no gradient from that."""
    out: Tensor = functional_call(factor, {name: p.detach() for name, p in factor.named_parameters()}, (x,))
    return out


ADAPTER = DyLoRA
