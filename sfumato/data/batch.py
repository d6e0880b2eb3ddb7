"""What the loader hands to the step: one frozen record, moved to the device in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

Cond = Mapping[str, Tensor]
"""Outputs of the text encoders, by name: {"hidden": (b, n, d), ...}."""
Tokens = Mapping[str, Tensor]
"""Outputs of the tokenizers, by name: {"ids": (b, chunks, 77), ...}."""
Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """b samples of one bucket.

    Exactly one of `latents` and `pixels` is given by the loader, and at most one of `cond` and `tokens`;
    the step turns pixels into latents and tokens into cond.
    """

    captions: Sequence[str]
    keys: Sequence[int]
    """One random key per sample, of (seed, epoch, sample)."""
    weight: Tensor
    """(b,) loss weight of the sample: prior_loss_weight for regularisation images."""
    multiplier: Tensor
    """(b,) strength of the adapter on the sample."""
    sizes: Tensor
    """(b, 6) original height and width, crop top and left, target height and width, in pixels."""
    latents: Tensor | None = None
    """(b, c, h, w) raw latents: before the VAE's shift and scale."""
    pixels: Tensor | None = None
    """(b, 3, H, W) in [-1, 1]."""
    cond: Cond | None = None
    tokens: Tokens | None = None
    mask: Tensor | None = None
    """(b, 1, h, w) in [0, 1], at latent size."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with all tensors on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, Mapping):
                return {k: move(v) for k, v in value.items()}
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def __len__(self) -> int:
        return len(self.keys)
