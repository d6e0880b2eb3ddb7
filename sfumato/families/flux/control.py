"""Control nets of FLUX.1: its first blocks, which take an image besides.

The image comes as pixels, through a few convolutions (XLabs 2024, github.com/XLabs-AI/x-flux), or as latents of the VAE
(InstantX 2024, diffusers' FluxControlNetModel).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sfumato.families.flux.facts import SAMPLE_GUIDANCE
from sfumato.families.flux.net import (
    FluxTrunk,
    Modulation,
    embed,
    embedder,
    guidance_embedder,
    pack,
    patches,
)
from sfumato.models.layers import Shapes, linear, modulation, numbered

HINT_WIDTH, HINT_STRIDES = 16, (1, 1, 2, 1, 2, 1, 2, 1)
"""Channels and steps of the convolutions from pixels to something shaped as latents."""


class ControlTrunk(FluxTrunk):
    """What control nets of FLUX and of Chroma share: all but where the modulation comes from."""

    def __init__(self, shapes: Shapes, modulation: Modulation) -> None:
        super().__init__(shapes, modulation)
        self.input_hint_block = hint_block(shapes) if "input_hint_block.0.weight" in shapes else None
        self.pos_embed_input = linear(shapes, "pos_embed_input")
        self.controlnet_blocks, self.controlnet_single_blocks = (
            nn.ModuleList(linear(shapes, name) for name in numbered(shapes, doors))
            for doors in ("controlnet_blocks", "controlnet_single_blocks")
        )

    def residuals(
        self,
        x: Tensor,
        context: Tensor,
        double: Iterable[tuple[Tensor, Tensor]],
        single: Iterable[Tensor],
        mask: Tensor | None,
        hint: Tensor,
    ) -> list[Tensor]:
        """As of `FluxBase.forward_blocks`; hint: pixels (b, 3, H, W) in [-1, 1] or latents shaped as x -> for each
        block (b, m, c)."""
        hint = hint if self.input_hint_block is None else self.input_hint_block(hint)
        size, img = patches(x), self.img_in(pack(x)) + self.pos_embed_input(pack(hint))
        states = self.states(img, context, size, double, single, mask)
        return [door(state) for door, state in zip(self.doors(), states, strict=True)]

    def doors(self) -> Sequence[nn.Module]:
        """One for each block, in forward order."""
        return [*self.controlnet_blocks, *self.controlnet_single_blocks]


class FluxControlNet(ControlTrunk):
    """What `Flux` takes, and hint (b, ...) -> for each block (b, m, c), which is added to tokens of the image."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, modulation)
        self.time_in, self.vector_in = embedder(shapes, "time_in"), embedder(shapes, "vector_in")
        self.guidance_in = guidance_embedder(shapes)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        hint: Tensor,
    ) -> list[Tensor]:
        """As of `Flux` and `ControlTrunk.residuals`. A net made for dev is told dev's usual guidance where the model
        is schnell, which takes none."""
        if guidance is None and self.guidance_in is not None:
            guidance = torch.full_like(t, SAMPLE_GUIDANCE)
        vec = embed(self, t, y, guidance, x.dtype)
        return self.residuals(
            x, context, [(vec, vec)] * len(self.double_blocks), [vec] * len(self.single_blocks), mask, hint
        )


def hint_block(shapes: Shapes) -> nn.Sequential:
    """Pixels (b, 3, H, W) -> (b, 16, H / 8, W / 8)."""
    layers: list[nn.Module] = []
    for i, stride in enumerate(HINT_STRIDES):
        out, into, kernel, _ = shapes[f"input_hint_block.{2 * i}.weight"]
        layers += [nn.Conv2d(into, out, kernel, stride=stride, padding=kernel // 2), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
