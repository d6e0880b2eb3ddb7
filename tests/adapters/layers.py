"""Layers of each kind whose rows share out into blocks of several sizes, with the shape of an input."""

from __future__ import annotations

from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), (2, 5, 8)),
    "linear_no_bias": (lambda: nn.Linear(8, 12, bias=False), (2, 8)),
    "conv1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 4)),
    "conv3x3": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 8, 6)),
    "conv3x3_dilated": (lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, bias=False), (2, 8, 7, 6)),
}
