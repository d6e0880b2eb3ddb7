"""Layers large enough for both ways of LoHa, and for LoKr's second factor to be a product."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

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
