"""Control nets of Stable Diffusion 3 and 3.5: its first blocks, which take the latents of an image besides (InstantX
2024, diffusers' SD3ControlNetModel)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from sfumato.families.sd3.net import Crop, MMDiTBase, patch_embedder
from sfumato.models.layers import Shapes, linear, numbered


class MMDiTControlNet(MMDiTBase):
    """What `MMDiT` takes, and hint (b, 16, h, w) -> for each block (b, m, c), which is added to tokens of the image."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, ends=False)
        self.pos_embed_input = nn.Sequential(OrderedDict(proj=patch_embedder(shapes, "pos_embed_input.proj")))
        self.controlnet_blocks = nn.ModuleList(linear(shapes, name) for name in numbered(shapes, "controlnet_blocks"))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        crop: Crop | None = None,
        positions: Tensor | None = None,
        *,
        hint: Tensor,
    ) -> list[Tensor]:
        """As of `MMDiT`; hint: latents shaped as x, the VAE's shift left out. Without the pooled text: as diffusers'
        pipeline and ComfyUI run such nets."""
        z = self.tokens(x, crop, positions) + self.pos_embed_input(hint).flatten(2).transpose(1, 2)
        states = self.states(z, context, self.embed(t, torch.zeros_like(y), x.dtype))
        return [door(state) for door, state in zip(self.controlnet_blocks, states, strict=True)]
