"""T-LoRA: the noisier a sample, the fewer ranks see it in training (arXiv:2507.05964), as much noise leaves little but
the layout to be learnt, which a few images overfit.

A file is a plain LoRA, all of whose ranks act; of twice the rank with one of the orthogonal starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters.base import LayerOptions, init_device
from sfumato.adapters.lora import LoRA
from sfumato.config.rules import Amount, Count, Must
from sfumato.errors import UserError
from sfumato.tensors.shapes import per_sample

_STARTS = ("", "principal", "middle", "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class TLoRAOptions(LayerOptions):
    min_rank: Count = 1
    """Ranks that see pure noise."""
    alpha_rank_scale: Amount = 1.0
    """The ranks beyond min_rank fall with (1 - noise level) to this power."""
    sig_type: Annotated[str, Must(_STARTS.__contains__, "principal, middle or last")] = ""
    """An orthogonal start, from the "principal", "middle" or "last" singular vectors; empty: LoRA's own."""
    use_data_init: bool = True
    """Singular vectors of the layer's weight; False: of a random matrix."""


class TLoRA(LoRA):
    """LoRA of which noisier samples see fewer ranks in training. A file is a plain LoRA; LyCORIS' own form of such
    files (`q_layer`, `p_layer`, `lambda_layer`) does not say from which start it counts, and is not read."""

    Options: ClassVar[type[LayerOptions]] = TLoRAOptions

    @classmethod
    def start_name(cls, options: LayerOptions) -> str:
        assert isinstance(options, TLoRAOptions)
        if not (options.use_data_init or options.sig_type):
            raise UserError("network_args use_data_init does nothing without sig_type: set it, or leave both out")
        return options.sig_type

    def start_weight(self, base: nn.Module, generator: torch.Generator) -> Tensor:
        weight = super().start_weight(base, generator)
        assert isinstance(self.options, TLoRAOptions)
        if self.options.use_data_init:
            return weight
        random = torch.empty(weight.shape, device=init_device(base)).normal_(generator=generator)
        return (random / self.options.rank).to(weight)

    def drop(self, h: Tensor) -> Tensor:
        level = self.context.noise_level
        if not self.training or level is None:
            return super().drop(h)
        assert isinstance(self.options, TLoRAOptions)
        rank, least = self.options.rank, min(self.options.min_rank, self.options.rank)
        # The little more: rounding must not take a rank away.
        seeing = ((1 - level) ** self.options.alpha_rank_scale * (rank - least) + 1e-4).floor() + least
        of_a_piece = torch.arange(len(self.lora_down.weight), device=h.device) % rank
        mask = of_a_piece < per_sample(seeing, h).view(-1, 1)
        return super().drop(h) * self.per_rank(mask.to(h.dtype), h)


ADAPTER = TLoRA
