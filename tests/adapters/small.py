"""A small net with every kind of layer that adapters go on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan
from sfumato.adapters.insert import AdapterNetwork, choose

TARGETS = {"linear": ("block.to_*", "block.proj"), "conv": ("block.conv*",)}


class Block(nn.Module):
    """Takes and gives (b, 6, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=2, dilation=2)
        self.proj = nn.Conv2d(6, 10, 1)
        self.to_q = nn.Linear(10, 12, bias=False)
        self.to_out = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(self.conv2(self.conv1(x).relu()))  # (b, 10, h, w)
        b, c, height, width = h.shape
        h = self.to_out(self.to_q(h.view(b, c, -1).transpose(1, 2)).relu())
        return h.transpose(1, 2).reshape(b, 6, height, width)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean((2, 3)))


def insert(net: nn.Module, plan: AdapterPlan, *, seed: int = 0) -> AdapterNetwork:
    return AdapterNetwork({"denoiser": choose(net, "denoiser", TARGETS, plan)}, seed=seed)


def disturb(inserted: AdapterNetwork) -> None:
    """Every parameter that is trained away from its start."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (p for p in inserted.parameters() if p.requires_grad):
            p.add_(0.3 * torch.randn(p.shape, generator=g))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 36), (2, 5, 24)),
    "vector": (lambda: nn.Linear(24, 36, bias=False), (2, 24)),
    "primes": (lambda: nn.Linear(7, 13), (2, 3, 7)),
    "conv1x1": (lambda: nn.Conv2d(24, 36, 1), (2, 24, 5, 4)),
    "conv3x3": (lambda: nn.Conv2d(24, 36, 3, padding=1), (2, 24, 5, 4)),
    "conv_stride": (lambda: nn.Conv2d(24, 18, 3, stride=2, padding=1), (2, 24, 7, 6)),
    "conv_odd": (lambda: nn.Conv2d(6, 9, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1)), (2, 6, 9, 8)),
}
"""Each kind of layer, and the shape of an input."""
