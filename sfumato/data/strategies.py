"""The four strategies of a family: how captions become tokens and cond, and how latents and cond are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from sfumato.data.batch import Cond, Tokens


class TokenizeStrategy(Protocol):
    """Captions -> tokens."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the result depends on besides the caption."""
        ...

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """b captions -> named tensors whose first dimension is b."""
        ...


class TextEncodingStrategy(Protocol):
    """Tokens -> cond."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the result depends on besides tokens and weights of the encoders."""
        ...

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """Tokens of b captions -> named tensors whose first dimension is b. Differentiable."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsCachingStrategy:
    """What a family says of its latents; keeping them is the same for all."""

    stride: int = 8
    """Picture pixels a latent pixel."""
    channels: int = 4
    dtype: torch.dtype = torch.float16
    """What latents are kept in."""
    suffix: str = "_sd.npz"
    """Ending of sd-scripts' own cache files, for importing them."""
    stored: Literal["raw", "final"] = "raw"
    """Whether sd-scripts' files hold latents before or after the VAE's shift and scale; ours are always raw."""

    def encode(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """(b, 3, H, W) in [-1, 1] -> (b, c, h, w): the posterior's mean, raw."""
        mean: Tensor = cast(Any, vae).encode(pixels).latent_dist.mode()
        return mean


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderOutputsCachingStrategy:
    """What a family says of its text outputs."""

    fields: tuple[str, ...]
    """Names in cond that are kept."""
    dtype: torch.dtype = torch.float16
    suffix: str = ""
    """Ending of sd-scripts' own cache files, for importing them; empty: it has none."""
    settings: Mapping[str, object] = field(default_factory=dict)
