"""LoRA: the change is a product of two thin matrices (arXiv:2106.09685); for convolutions, LoCon as LyCORIS has it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sfumato.adapters.base import Adapter, LayerOptions, as_input, device_of


class LoRA(Adapter):
    """`y + multiplier * alpha / rank * up(down(x))`. A convolution's `down` has its kernel, stride and padding; its `up` is 1x1."""

    supports = frozenset({"dropout", "rank_dropout", "module_dropout"})

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        super().__init__(base, options, generator)
        self.lora_down: nn.Linear | nn.Conv2d
        self.lora_up: nn.Linear | nn.Conv2d
        self.lora_down, self.lora_up = _pair(base, options.rank)
        start = nn.init.kaiming_uniform_(torch.empty(self.lora_down.weight.shape), a=math.sqrt(5), generator=generator)
        self.lora_down.weight = nn.Parameter(start.to(device_of(base)))
        self.lora_up.weight = nn.Parameter(torch.zeros(self.lora_up.weight.shape, device=device_of(base)))

    @classmethod
    def read(cls, leaves: Mapping[str, Tensor]) -> LayerOptions | None:
        if leaves.keys() - {"alpha"} != {"lora_down.weight", "lora_up.weight"}:
            return None
        rank = leaves["lora_down.weight"].shape[0]
        return LayerOptions(rank=rank, alpha=float(leaves.get("alpha", rank)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.lora_down(as_input(x, self.lora_down.weight))
        if self.training:
            h = self._drop(h)
        return self.add(y, self.lora_up(h), self.options.scale)

    def change(self, weight: Tensor) -> Tensor:
        up, down = self.lora_up.weight.float(), self.lora_down.weight.float()
        return (up.flatten(1) @ down.flatten(1)).view(weight.shape) * self.options.scale

    def plus_parameters(self) -> list[nn.Parameter]:
        return list(self.lora_up.parameters())

    @torch.no_grad()
    def scale_norm(self, limit: float) -> tuple[Tensor, Tensor]:
        """Both factors take an equal share, as in sd-scripts."""
        up, down = self.lora_up.weight, self.lora_down.weight
        norm = torch.linalg.matrix_norm(up.flatten(1) @ down.flatten(1)) * abs(self.options.scale)
        ratio = (limit / norm).clamp(max=1.0)
        up.mul_(ratio.sqrt())
        down.mul_(ratio.sqrt())
        return norm * ratio, ratio < 1.0

    def _drop(self, h: Tensor) -> Tensor:
        """(b, ..., rank) or (b, rank, h, w) with the dropouts of one step."""
        if p := self.options.dropout:
            h = h * self.kept("dropout", p, h.shape, h.device).to(h.dtype) / (1 - p)
        if p := self.options.rank_dropout:
            kept = self.kept("rank_dropout", p, (h.shape[0], self.options.rank), h.device).to(h.dtype) / (1 - p)
            ones = [1] * (h.ndim - 2)
            h = h * kept.view(len(h), *((-1, *ones) if isinstance(self.lora_down, nn.Conv2d) else (*ones, -1)))
        return h


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
