"""The transformer of Lumina Image 2.0 (a NextDiT), in the names of its checkpoints.

Sizes, heads and the number of blocks are read off the tensors' shapes, so a tiny model and the real ones take the same
path. Architecture: Qin et al. 2025 (arXiv:2503.21758), section 3: text and image pass a few blocks of their own, then
one sequence of blocks together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.models.layers import MLP, Denoiser, RMSNorm, Shapes, linear, numbered, timestep_embedding
from sfumato.tensors.attention import attention
from sfumato.tensors.rope import rope, rotate

PATCH = 2
"""A token of the image is a square of so many latents."""
THETA = 10_000
NORM_EPS = 1e-5
"""Of every norm with weights."""
LAST_EPS = 1e-6
"""Of the norm before the last layer, which has none."""
STACKS = ("context_refiner", "noise_refiner", "layers")
"""Blocks of the text alone, of the image alone, and of both, in forward order."""


class Lumina2(Denoiser):
    """x (b, 16, h, w), t (b,), context (b, n, 2304) -> (b, 16, h, w); even h and w."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        head = shapes["layers.0.attention.q_norm.weight"][0]
        if head % 6:
            raise UserError(f"the transformer has heads of {head} channels, which three axes cannot share evenly")
        self.axes = (head // 3,) * 3
        self.t_channels = shapes["t_embedder.mlp.0.weight"][1]
        self.t_embedder = nn.Sequential(OrderedDict(mlp=MLP(shapes, "t_embedder.mlp")))
        self.cap_embedder = nn.Sequential(norm(shapes, "cap_embedder.0"), linear(shapes, "cap_embedder.1"))
        self.x_embedder = linear(shapes, "x_embedder")
        self.context_refiner, self.noise_refiner, self.layers = (
            nn.ModuleList(Block(shapes, name) for name in numbered(shapes, stack)) for stack in STACKS
        )
        self.final_layer = FinalLayer(shapes, "final_layer")

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """The predicted velocity from noise to image, shaped as x, at time t in [0, 1] (0: noise alone).

        context: states of Gemma. mask: (b, n) bool, True for the tokens of the caption, which come first; None: all
        are.
        """
        (b, n), (h, w) = context.shape[:2], x.shape[-2:]
        if h % PATCH or w % PATCH:
            raise UserError(
                f"latents of {h} x {w} cannot be cut into patches of {PATCH} x {PATCH}: both sides must be even"
            )
        vec = self.t_embedder(timestep_embedding(t, self.t_channels).to(x.dtype))
        used = torch.full((b,), n, device=x.device) if mask is None else mask.sum(1)
        pe = rope(positions(used, n, h // PATCH, w // PATCH), self.axes, THETA)[:, :, None]  # over all heads
        # Without a mask none is made: kernels that take no mask stay usable.
        text_mask = None if mask is None else mask[:, None, None]  # (b, 1, 1, n)
        txt, img = self.cap_embedder(context), self.x_embedder(pack(x))
        for block in self.context_refiner:
            txt = block(txt, pe[..., :n, :], text_mask)
        for block in self.noise_refiner:
            img = block(img, pe[..., n:, :], None, vec)
        attn_mask = None if text_mask is None else F.pad(text_mask, (0, img.shape[1]), value=True)
        tokens = torch.cat([txt, img], 1)
        for block in self.layers:
            tokens = block(tokens, pe, attn_mask, vec)
        return unpack(self.final_layer(tokens[:, n:], vec), h, w)


class Block(nn.Module):
    """Attention and a gated two-layer net, each between two norms; modulated by the time, but for those of the text."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.attention = Attention(shapes, f"{name}.attention")
        self.feed_forward = FeedForward(shapes, f"{name}.feed_forward")
        self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2 = (
            norm(shapes, f"{name}.{part}") for part in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
        )
        made = f"{name}.adaLN_modulation.1"
        self.adaLN_modulation = (
            nn.Sequential(nn.SiLU(), linear(shapes, made)) if f"{made}.weight" in shapes else nn.Identity()
        )

    def forward(self, x: Tensor, pe: Tensor, mask: Tensor | None, vec: Tensor | None = None) -> Tensor:
        """x (b, n, c), rope and mask of its n tokens, vec (b, d) of a modulated block -> (b, n, c)"""
        if vec is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), pe, mask))
            x = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
            return x
        scale1, gate1, scale2, gate2 = self.adaLN_modulation(vec)[:, None].chunk(4, -1)  # (b, 1, c) each
        y = self.attention(self.attention_norm1(x) * (1 + scale1), pe, mask)
        x = x + gate1.tanh() * self.attention_norm2(y)
        y = self.feed_forward(self.ffn_norm1(x) * (1 + scale2))
        x = x + gate2.tanh() * self.ffn_norm2(y)
        return x


class Attention(nn.Module):
    """Self attention whose keys and values are shared by groups of heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.qkv, self.out = linear(shapes, f"{name}.qkv"), linear(shapes, f"{name}.out")
        self.q_norm, self.k_norm = norm(shapes, f"{name}.q_norm"), norm(shapes, f"{name}.k_norm")
        self.head = shapes[f"{name}.q_norm.weight"][0]
        heads, pairs = self.out.in_features // self.head, 2 * self.head
        shared = (self.qkv.out_features - heads * self.head) // pairs
        if (
            shared < 1
            or heads % shared
            or (heads * self.head, shared * pairs)
            != (
                self.out.in_features,
                self.qkv.out_features - self.out.in_features,
            )
        ):
            raise UserError(
                f"{name}: {self.qkv.out_features} rows cannot be cut into queries, keys and values of heads of "
                f"{self.head}"
            )
        self.counts = [heads, shared, shared]

    def forward(self, x: Tensor, pe: Tensor, mask: Tensor | None) -> Tensor:
        """x (b, n, c), rope and mask of its n tokens -> (b, n, c)"""
        heads = torch.unflatten(self.qkv(x), -1, (-1, self.head)).transpose(1, 2)
        q, k, v = torch.split(heads, self.counts, 1)
        q, k = rotate(self.q_norm(q), pe), rotate(self.k_norm(k), pe)
        groups = self.counts[0] // self.counts[1]
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
        y: Tensor = self.out(attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return y


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (linear(shapes, f"{name}.{part}") for part in ("w1", "w2", "w3"))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, c)"""
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class FinalLayer(nn.Module):
    """Tokens of the image -> patches."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.linear = linear(shapes, f"{name}.linear")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(shapes, f"{name}.adaLN_modulation.1"))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x (b, m, c), vec (b, d) -> (b, m, patch * patch * 16)"""
        y: Tensor = self.linear(F.layer_norm(x, x.shape[-1:], eps=LAST_EPS) * (1 + self.adaLN_modulation(vec)[:, None]))
        return y


def norm(shapes: Shapes, name: str) -> RMSNorm:
    """The norm of this name."""
    return RMSNorm(shapes[f"{name}.weight"][0], eps=NORM_EPS)


def blocks(net: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a `Lumina2` in forward order."""
    return [block for stack in STACKS for block in cast(nn.ModuleList, getattr(net, stack))]


def positions(used: Tensor, n: int, h: int, w: int) -> Tensor:
    """(b, n + h * w, 3): (i, 0, 0) for the i-th token of the text, then (used, y, x) for those of the image; `used`
    (b,) tokens have a caption, of n."""
    device = used.device
    text = F.pad(torch.arange(n, device=device)[:, None], (0, 2)).expand(len(used), -1, -1)
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    places = torch.stack([y, x], -1).flatten(0, 1).expand(len(used), -1, -1)
    return torch.cat([text, torch.cat([used[:, None, None].expand(-1, h * w, -1), places], -1)], 1)


def pack(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h/2 * w/2, 2 * 2 * c): the channels of each latent of a patch together."""
    squares = torch.unflatten(torch.unflatten(x, 3, (-1, PATCH)), 2, (-1, PATCH))  # (b, c, h/2, 2, w/2, 2)
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpack(x: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`, to (b, c, h, w)."""
    latents = torch.unflatten(x, 2, (PATCH, PATCH, -1))
    squares = torch.unflatten(latents, 1, (h // PATCH, w // PATCH))  # (b, h/2, w/2, 2, 2, c)
    return squares.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
