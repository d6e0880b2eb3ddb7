"""The transformer of Chroma, in the names of its checkpoints.

It is FLUX.1 without the layers that make modulations within the blocks, and without the pooled caption: one small net
makes all modulations of a forward at once (github.com/lodestone-rock/flow).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sfumato.families.flux.net import FluxBase, embedder
from sfumato.models.layers import RMSNorm, Shapes, linear, numbered, timestep_embedding

DOUBLE, SINGLE, LAST = 6, 3, 2
"""Modulation vectors of a stream in a double block, of a single block, and of the last layer."""


class Chroma(FluxBase):
    """x (b, 16, h, w), t (b,), context (b, n, 4096) -> (b, 16, h, w); even h and w."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, no_modulation)
        self.distilled_guidance_layer = Approximator(shapes, "distilled_guidance_layer")

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """The predicted velocity, shaped as x, at time t in [0, 1] (1: noise alone).

        context: states of T5. mask: (b, n) bool, False for tokens of the text that no token attends to; None: all are
        attended to.
        """
        single, img, txt, last = self.vectors(t, x.dtype)
        doubles, singles = len(self.double_blocks), len(self.single_blocks)
        double = zip(cut(img, DOUBLE, doubles), cut(txt, DOUBLE, doubles), strict=True)
        return self.forward_blocks(x, context, double, cut(single, SINGLE, singles), last, mask)

    def vectors(self, t: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """Every modulation vector at time t (b,): of single blocks, of images of double blocks, of their texts, of the
        last layer; (b, 344, c) together in the real model, in this order."""
        doubles, singles = len(self.double_blocks), len(self.single_blocks)
        counts = [SINGLE * singles, DOUBLE * doubles, DOUBLE * doubles, LAST]
        return torch.split(self.distilled_guidance_layer(t, sum(counts), dtype), counts, 1)


def cut(vectors: Tensor, each: int, blocks: int) -> list[Tensor]:
    """(b, n, c) -> for each of so many blocks, from the first, its own (b, each, c)."""
    return [vectors[:, i * each : (i + 1) * each] for i in range(blocks)]


class Approximator(nn.Module):
    """Every modulation vector, from its number and the time."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.in_proj, self.out_proj = linear(shapes, f"{name}.in_proj"), linear(shapes, f"{name}.out_proj")
        self.layers = nn.ModuleList(embedder(shapes, layer) for layer in numbered(shapes, f"{name}.layers"))
        self.norms = nn.ModuleList(
            RMSNorm(shapes[f"{name}.norms.{i}.scale"][0], "scale") for i in range(len(self.layers))
        )

    def forward(self, t: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """t (b,) -> (b, count, c)"""
        x = self.in_proj(self.embedding(t, count).to(dtype))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        y: Tensor = self.out_proj(x)
        return y

    def embedding(self, t: Tensor, count: int) -> Tensor:
        """(b, count, channels), fp32: a quarter embeds the time, a quarter the guidance, always 0, a half the vector's
        number."""
        quarter = self.in_proj.in_features // 4
        time = torch.cat(
            [timestep_embedding(1000 * t.float(), quarter), timestep_embedding(torch.zeros_like(t), quarter)], -1
        )
        number = timestep_embedding(1000 * torch.arange(count, device=t.device), 2 * quarter)
        return torch.cat([time[:, None].expand(-1, count, -1), number.expand(len(t), -1, -1)], -1)


def no_modulation(shapes: Shapes, name: str) -> nn.Module:
    """A block's `vec` is its modulation already."""
    return nn.Identity()
