"""LoRA-FA: LoRA whose `down` stays as it starts (arXiv:2308.03303), so that no layer's input is kept for its gradient.

The start is sd-scripts'. A file is a plain LoRA.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters.additive import AdditiveOptions
from sfumato.adapters.base import LayerOptions, init_device
from sfumato.adapters.lora import LoRA


class LoRAFA(LoRA):
    """LoRA whose `down` stays as it starts, which takes less memory; a file is a plain LoRA."""

    Options: ClassVar[type[LayerOptions]] = AdditiveOptions

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        self.lora_down.weight.requires_grad_(False)

    def start_values(self, base: nn.Module, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal, of variance 2 / (input channels + rank)."""
        std = math.sqrt(2 / (shape[1] + shape[0]))
        return torch.empty(shape, device=init_device(base)).normal_(std=std, generator=generator)

    @property
    def factors(self) -> int:
        return 1


ADAPTER = LoRAFA
