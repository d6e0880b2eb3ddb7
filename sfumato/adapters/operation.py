"""What a layer does with its weight, for kinds of adapters that do the same with another one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WRITTEN = 64
"""What a number that is written and read again takes, in multiplications: about 30 on a CPU, 200 on a card."""


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """For a tensor's device. Where there is no autocast it costs nothing, which layers of a small net would feel."""
    device = t.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # nets without values have none
    return torch.autocast(device, enabled=False) if on else nullcontext()


class Operation:
    """A linear layer's or a convolution's."""

    def __init__(self, base: nn.Module) -> None:
        """Errors: `TypeError` for a layer that adapters do not go on."""
        self.convolution: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
        """Stride, padding and dilation; None: a linear layer."""
        self.shape: tuple[int, ...]
        """Of the weight: (out, in) or (out, in, *kernel)."""
        if isinstance(base, nn.Linear):
            self.shape = (base.out_features, base.in_features)
            return
        if (
            not isinstance(base, nn.Conv2d)
            or base.groups != 1
            or isinstance(base.padding, str)
            or base.padding_mode != "zeros"
        ):
            raise TypeError(f"adapters go on linear layers and on convolutions without groups, not on {base}")
        self.shape = (base.out_channels, base.in_channels, *base.kernel_size)
        self.convolution = tuple(base.stride), tuple(map(int, base.padding)), tuple(base.dilation)

    @property
    def channels(self) -> int:
        """The dimension of inputs and outputs that the weight acts on."""
        return 1 if self.convolution else -1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x through a weight whose dimensions behind the first may be flattened, without bias."""
        weight = weight.view(-1, *self.shape[1:])
        if not self.convolution:
            return functional.linear(x, weight)
        return functional.conv2d(x, weight, None, *self.convolution)

    def mix(self, x: Tensor, weight: Tensor) -> Tensor:
        """x's channels through a matrix."""
        return functional.conv2d(x, weight[..., None, None]) if self.convolution else functional.linear(x, weight)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor]:
        """(that of x if `wanted`, that of the weight, flattened and in fp32), from the output's."""
        if not self.convolution:
            grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
            return grad @ weight if wanted else None, grad_weight.float()
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight.view(self.shape), None, *self.convolution, False, (0, 0), 1, (wanted, True, False)
        )  # fmt: skip
        return grad_x, grad_weight.flatten(1).float()
