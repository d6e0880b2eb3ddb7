"""GGPO: noise on what a layer puts out in training, by the norms of its weight and of its gradient, so that training
ends where such noise does little harm (sd-scripts' `ggpo_sigma` and `ggpo_beta`, after Flat-LoRA, arXiv:2409.14396)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sfumato.adapters.base import Adapter
from sfumato.adapters.operation import Operation


class Perturbation(nn.Module):
    """As if normal noise were added to the layer's weight, another for each sample, of the standard deviation

        (sigma * norm + beta * gradient's norm ** 2) / sqrt(rows)

    in each of its rows: the norm of W's row and dW's, as if these were orthogonal, and that of the gradient of W + dW,
    as far as the factors' gradients tell it.
    """

    def __init__(self, base: nn.Module, sigma: float, beta: float) -> None:
        super().__init__()
        assert isinstance(base.weight, Tensor)
        weight = base.weight.detach().float().flatten(1)
        self.operation, self.sigma, self.beta = Operation(base), sigma, beta
        self.register_buffer("squares", weight.square().sum(1, keepdim=True), persistent=False)
        self.squares: Tensor
        # A parameter, so that a run's state holds it. None before the first step.
        self.deviation = nn.Parameter(torch.zeros_like(self.squares), requires_grad=False)

    @torch.no_grad()
    def update(self, up: Tensor, down: Tensor, scale: float) -> None:
        """Take in a step: both factors, with their gradients. Nothing is read from the device."""
        if up.grad is None or down.grad is None:
            return
        left, right = torch.cat((up, up.grad), 1).flatten(1), torch.cat((down.grad, down)).flatten(1)
        norm = (self.squares + scale**2 * _row_squares(up.flatten(1), down.flatten(1))).sqrt()
        deviation = (self.sigma * norm + self.beta * scale**2 * _row_squares(left, right)) / math.sqrt(len(norm))
        # A gradient that is not finite is a step that the scaler of fp16 left out.
        self.deviation.copy_(torch.where(deviation.isfinite(), deviation, self.deviation))

    @torch.no_grad()
    def forward(self, adapter: Adapter, x: Tensor) -> Tensor:
        """The noise on the output for the layer's input x."""
        generators = adapter.generators("ggpo", x.device)
        shape = (len(self.deviation), math.prod(self.operation.shape[1:]))
        parts = []
        for generator, part in zip(generators, x.chunk(len(generators)), strict=True):
            noise = torch.randn(shape, generator=generator, device=x.device)
            parts.append(self.operation(part, (noise * self.deviation.float()).to(x.dtype)))
        return torch.cat(parts)


def _row_squares(left: Tensor, right: Tensor) -> Tensor:
    """(out, 1): the squared norms of the rows of left @ right, which is not built; fp32."""
    left, right = left.float(), right.float()
    return (left @ (right @ right.T) * left).sum(1, keepdim=True).clamp(min=0)
