"""The transformer of Stable Diffusion 3 and 3.5 (MMDiT), in the names of its checkpoints.

Sizes, the number of blocks, and which blocks normalise queries and keys or attend twice are read off the names
and shapes of the tensors, so a tiny model and the real ones take the same path. Architecture: Esser et al. 2024
(arXiv:2403.03206), section 4.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.models.layers import (
    GELU,
    MLP,
    Denoiser,
    RMSNorm,
    Shapes,
    linear,
    modulate,
    numbered,
    split_heads,
    timestep_embedding,
)
from sfumato.tensors.attention import attention

Crop = Tensor | tuple[int, int]
"""Where in the table of positions an image lies: the row and column of its first patch; (b, 2), or one for all
samples."""

SAMPLE_SIZE = 128
"""Latent pixels a side of the images that the published models are made for."""
HEAD_WIDTH = 64
"""Channels of an attention head in every published model."""


class MMDiTBase(Denoiser):
    """Tokens of image and text, and the blocks that they pass: what the denoiser and its control nets share."""

    pos_embed: Tensor
    """(1, side * side, c) sines and cosines of rows and columns; not trained."""

    def __init__(self, shapes: Shapes, *, ends: bool) -> None:
        """`ends`: whether the text ends in the last block."""
        super().__init__(shapes)
        self.patch = shapes["x_embedder.proj.weight"][-1]
        self.side = _side(shapes)
        self.register_buffer("pos_embed", torch.empty(shapes["pos_embed"]))
        self.x_embedder = nn.Sequential(OrderedDict(proj=patch_embedder(shapes, "x_embedder.proj")))
        self.t_channels = shapes["t_embedder.mlp.0.weight"][1]
        self.t_embedder, self.y_embedder = (
            nn.Sequential(OrderedDict(mlp=MLP(shapes, f"{name}.mlp"))) for name in ("t_embedder", "y_embedder")
        )
        self.context_embedder = linear(shapes, "context_embedder")
        names = numbered(shapes, "joint_blocks")
        self.joint_blocks = nn.ModuleList(JointBlock(shapes, name, last=ends and name == names[-1]) for name in names)

    @property
    def largest(self) -> int:
        """The largest height and width of latents that there are positions for."""
        return self.side * self.patch

    def embed(self, t: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        """t (b,), y (b, d) -> what every block is modulated by (b, c)."""
        c: Tensor = self.t_embedder(timestep_embedding(t, self.t_channels).to(dtype)) + self.y_embedder(y)
        return c

    def tokens(self, x: Tensor, crop: Crop | None, positions: Tensor | None) -> Tensor:
        """Those of the image, (b, h * w, c); see `MMDiT.forward`."""
        h, w = self.patches(*x.shape[-2:])
        z: Tensor = self.x_embedder(x).flatten(2).transpose(1, 2)
        # In rows again, or every norm would have to copy; and the table may be of more bits than the rest.
        return (z + (self.positions(h, w, crop) if positions is None else positions)).to(z.dtype).contiguous()

    def states(self, z: Tensor, context: Tensor, c: Tensor) -> Iterator[Tensor]:
        """The tokens of the image after each block; z: before the first; c: of `embed`."""
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, z = block(context, z, c)
            yield z

    def positions(self, h: int, w: int, crop: Crop | None) -> Tensor:
        """The part of the table for h x w patches: (1, h * w, c), or (b, h * w, c) with one place per sample."""
        table = self.pos_embed.reshape(self.side, self.side, -1)
        if isinstance(crop, Tensor):
            rows, columns = (crop[:, i, None] + torch.arange(n, device=crop.device) for i, n in enumerate((h, w)))
            return table[rows[:, :, None], columns[:, None, :]].flatten(1, 2)
        top, left = ((self.side - h) // 2, (self.side - w) // 2) if crop is None else crop
        return table[None, top : top + h, left : left + w].flatten(1, 2)

    def patches(self, h: int, w: int) -> tuple[int, int]:
        """Patches of h x w latents."""
        if h % self.patch or w % self.patch:
            raise UserError(f"latents of {h} x {w} cannot be cut into patches of {self.patch} x {self.patch}")
        if max(h, w) > self.largest:
            most = f"{self.largest} x {self.largest}"
            raise UserError(
                f"latents of {h} x {w} are too large for this model, which knows the positions of at most {most}"
            )
        return h // self.patch, w // self.patch


class MMDiT(MMDiTBase):
    """x (b, 16, h, w), t (b,) in [0, 1000], context (b, n, 4096), y (b, 2048) -> (b, 16, h, w)."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, ends=True)
        self.final_layer = FinalLayer(shapes, "final_layer")

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        crop: Crop | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The velocity from image to noise at x, shaped as x.

        context: states of the text's tokens; y: the pooled text; crop: None puts the image in the middle of the
        table of positions; positions (1 or b, h * w, c): those of the patches, in place of the table's.
        Errors: `UserError` for sizes that are no whole number of patches, or larger than the table.
        """
        z = self.tokens(x, crop, positions)
        c = self.embed(t, y, x.dtype)
        for state in self.states(z, context, c):
            z = state
        out = (
            self.final_layer(z, c).unflatten(1, self.patches(*x.shape[-2:])).unflatten(-1, (self.patch, self.patch, -1))
        )  # (b, h, w, p, p, 16)
        velocity: Tensor = out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return velocity


def blocks(net: nn.Module) -> Sequence[nn.Module]:
    """The repeated blocks, in forward order."""
    return list(cast(MMDiTBase, net).joint_blocks)


class JointBlock(nn.Module):
    """Text and image attend to both together; all else each does by itself."""

    def __init__(self, shapes: Shapes, path: str, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.context_block = Stream(shapes, f"{path}.context_block", goes_on=not last)
        self.x_block = Stream(shapes, f"{path}.x_block")

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """context (b, n, c), x (b, patches, c), c (b, c) -> (context, x); the last block leaves the context as it
        is."""
        n = context.shape[1]
        context_mod, x_mod = self.context_block.modulation(c), self.x_block.modulation(c)
        both = zip(self.context_block.qkv(context, context_mod), self.x_block.qkv(x, x_mod), strict=True)
        q, k, v = (torch.cat(pair, 2) for pair in both)
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.x_block.update(x, attended[:, n:], x_mod)
        return context if self.last else self.context_block.update(context, attended[:, :n], context_mod), x


class Stream(nn.Module):
    """What a block does to the text, or to the image.

    Its modulation is made of the clock and the pooled text: shift, scale and gate of the attention, those of the
    two-layer net, and those of a second attention within the stream where it has one (3.5 medium), each (b, 1, c).
    Of a text that ends in this block only the first two are left, and neither projection nor two-layer net.
    """

    def __init__(self, shapes: Shapes, path: str, *, goes_on: bool = True) -> None:
        super().__init__()
        self.attn = Attention(shapes, f"{path}.attn", out=goes_on)
        self.attn2 = Attention(shapes, f"{path}.attn2") if f"{path}.attn2.qkv.weight" in shapes else None
        self.mlp = MLP(shapes, f"{path}.mlp", GELU, ("fc1", "fc2")) if goes_on else nn.Identity()
        self.parts = (9 if self.attn2 is not None else 6) if goes_on else 2
        width = shapes[f"{path}.adaLN_modulation.1.weight"][1]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.parts * width))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """c (b, c) -> `parts` tensors (b, 1, c)."""
        out: Tensor = self.adaLN_modulation(c)[:, None]
        return out.chunk(self.parts, -1)

    def qkv(self, x: Tensor, mod: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, n, c) -> its queries, keys and values (b, heads, n, 64)."""
        return self.attn.heads(modulate(x, mod[0], mod[1]))

    def update(self, x: Tensor, attended: Tensor, mod: Sequence[Tensor]) -> Tensor:
        """x (b, n, c) and the output of the common attention for it (b, n, c) -> (b, n, c)."""
        y: Tensor = x + mod[2] * self.attn.proj(attended)
        if self.attn2 is not None:
            y = y + mod[8] * self.attn2(modulate(x, mod[6], mod[7]))
        y = y + mod[5] * self.mlp(modulate(y, mod[3], mod[4]))
        return y


class Attention(nn.Module):
    """Queries, keys and values from one projection; `proj` follows the attention. 3.5 normalises queries and keys."""

    def __init__(self, shapes: Shapes, path: str, *, out: bool = True) -> None:
        super().__init__()
        self.qkv = linear(shapes, f"{path}.qkv")
        if self.qkv.out_features % (3 * HEAD_WIDTH):
            raise UserError(f"{path}: {self.qkv.out_features // 3} channels cannot be cut into heads of {HEAD_WIDTH}")
        self.ln_q, self.ln_k = (
            RMSNorm(HEAD_WIDTH) if f"{path}.{n}.weight" in shapes else nn.Identity() for n in ("ln_q", "ln_k")
        )
        self.proj = linear(shapes, f"{path}.proj") if out else nn.Identity()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, n, c) -> q, k, v (b, heads, n, 64)"""
        q, k, v = split_heads(self.qkv(x), HEAD_WIDTH)
        return self.ln_q(q), self.ln_k(k), v

    def forward(self, x: Tensor) -> Tensor:
        """Attention within x: (b, n, c) -> (b, n, c)"""
        y: Tensor = self.proj(attention(*self.heads(x)).transpose(1, 2).flatten(2))
        return y


class FinalLayer(nn.Module):
    """A modulated norm, and the projection to the latents of a patch."""

    def __init__(self, shapes: Shapes, path: str) -> None:
        super().__init__()
        self.linear = linear(shapes, f"{path}.linear")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(shapes, f"{path}.adaLN_modulation.1"))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (b, n, c), c (b, c) -> (b, n, patch * patch * 16)"""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        y: Tensor = self.linear(modulate(x, shift, scale))
        return y


def _side(shapes: Shapes) -> int:
    """Patches along a side of the table of positions."""
    count = shapes["pos_embed"][1]
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"pos_embed: {count} positions are no square")
    return side


def patch_embedder(shapes: Shapes, name: str) -> nn.Conv2d:
    """Latents -> a token for each patch."""
    out, into, patch, _ = shapes[f"{name}.weight"]
    return nn.Conv2d(into, out, patch, stride=patch)


def transformer_config(net: MMDiTBase, kind: str) -> dict[str, Any]:
    """What diffusers' class `kind` has in its config of a transformer like this one."""
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    width, channels = shapes["x_embedder.proj.weight"][:2]
    dual = [i for i in range(len(net.joint_blocks)) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes]
    return {
        "_class_name": kind,
        "sample_size": SAMPLE_SIZE,
        "patch_size": net.patch,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": len(net.joint_blocks),
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": width // HEAD_WIDTH,
        "joint_attention_dim": net.context_embedder.in_features,
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": net.side,
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }
