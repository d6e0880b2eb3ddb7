"""What the loader hands to the step: one frozen record, moved to the device in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.tensors.noise import Drawn
from sfumato.tensors.packed import Layout

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
    preserve: Tensor | None = None
    """(b,) 1 where the target is what the model predicts without its adapter, 0 elsewhere; None: nowhere."""
    mask: Tensor | None = None
    """(b, 1, h, w) in [0, 1], at latent size."""
    control: Tensor | None = None
    """(b, 3, H, W) in [0, 1]: the images that the samples are to follow, cropped and mirrored as they are."""
    drawn: Drawn = field(default_factory=dict)
    """What chance decides of the samples, but for adapters' dropouts: noise, timesteps and the like."""
    packed: Tensor | None = None
    """(n,) uint8: the memory in which all tensors lie, after `pack`."""

    def pack(self, *, pinned: bool) -> Batch:
        """The same batch with all tensors in one run of bytes, for `to` to copy it at once; `pinned`: in page-locked
        memory, so that nothing waits for the copy."""
        tensors = self._tensors()
        layout = Layout.of(tensors)
        flat = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pinned)
        layout.pack(tensors, flat)
        return self._with(layout.views(flat), flat)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with all tensors on `device`."""
        tensors = self._tensors()
        if self.packed is None:
            return self._with({name: t.to(device) for name, t in tensors.items()}, None)
        # Of a copy to Apple's from memory that is given up meanwhile other values arrive (pytorch issue 189690).
        flat = self.packed.to(device, non_blocking=torch.device(device).type != "mps")
        return self._with(Layout.of(tensors).views(flat), flat)

    def split(self, size: int | None) -> list[Batch]:
        """The same samples in batches of at most `size`, in the same memory; None: in one."""
        count = len(self)
        if size is None or size >= count:
            return [self]
        return [self._part(slice(i, min(i + size, count))) for i in range(0, count, size)]

    def _part(self, which: slice) -> Batch:
        # What is drawn for all samples alike has one row.
        tensors = {name: t[which] if len(t) == len(self) else t for name, t in self._tensors().items()}
        return replace(self._with(tensors, None), captions=self.captions[which], keys=self.keys[which])

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors, by field, or field and name: {"latents": ..., "cond.hidden": ...}."""
        found: dict[str, Tensor] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and f.name != "packed":
                found[f.name] = value
            elif isinstance(value, Mapping):
                found |= {f"{f.name}.{name}": t for name, t in value.items()}
        return found

    def _with(self, tensors: Mapping[str, Tensor], packed: Tensor | None) -> Batch:
        """The same batch with these tensors in place of `_tensors`."""
        values: dict[str, Any] = {}
        for name, t in tensors.items():
            whole, _, part = name.partition(".")
            if part:
                values.setdefault(whole, {})[part] = t
            else:
                values[whole] = t
        return replace(self, **values, packed=packed)

    def __len__(self) -> int:
        return len(self.keys)
