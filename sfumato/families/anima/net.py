"""The transformer of Anima, in the names of its checkpoints: Cosmos-Predict2 for single images, with an adapter of its
own that makes the text that it attends to.

Sizes and the number of blocks are read off the tensors' shapes, so a tiny model, one of other depth and the published
one take the same path. Architecture: NVIDIA 2025 (github.com/nvidia-cosmos/cosmos-predict2, MiniTrainDIT); the text
adapter: Circlestone Labs 2026.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.models.layers import MLP, Denoiser, RMSNorm, Shapes, linear, modulate, numbered, timestep_embedding
from sfumato.tensors.attention import attention
from sfumato.tensors.rope import rope, rotate_halves

PATCH = 2
"""A token of the image is a square of so many latents."""
THETA, STRETCH = 10_000.0, 4.0
"""Of the image's rope: the longest wavelength is stretched by so much, for images larger than those that the net was
first trained on (rope_h_extrapolation_ratio there)."""
ROWS = 512
"""The text has at least so many rows, zeros behind its own, which the image attends to as well."""


class Anima(Denoiser):
    """x (b, 16, h, w), t (b,), states (b, n, 1024), ids (b, m) -> (b, 16, h, w); even h and w."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.x_embedder = _nested(linear(shapes, "x_embedder.proj.1"), "proj", "1")
        self.t_embedder = _nested(MLP(shapes, "t_embedder.1", names=("linear_1", "linear_2")), "1")
        self.t_embedding_norm = _norm(shapes, "t_embedding_norm")
        self.llm_adapter = TextAdapter(shapes, "llm_adapter")
        self.blocks = nn.ModuleList(Block(shapes, name) for name in numbered(shapes, "blocks"))
        self.final_layer = FinalLayer(shapes, "final_layer")

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        states: Tensor,
        ids: Tensor,
        states_mask: Tensor | None = None,
        ids_mask: Tensor | None = None,
    ) -> Tensor:
        """The predicted velocity, shaped as x, at time t in [0, 1] (1: noise alone).

        states: of Qwen3. ids: T5's tokens of the same caption. Masks: True for the caption's own, which come first;
        None: all are.
        """
        h, w = x.shape[-2:]
        if h % PATCH or w % PATCH:
            raise UserError(
                f"latents of {h} x {w} cannot be cut into patches of {PATCH} x {PATCH}: both sides must be even"
            )
        text = self.llm_adapter(states, ids, states_mask, ids_mask)
        seen = rows_seen(text.shape[1], ids_mask)
        text = F.pad(text, (0, 0, 0, max(ROWS - text.shape[1], 0)))
        tokens = F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)
        # Room for a further channel, which marks what an image of another shape was padded with: here nothing.
        tokens = self.x_embedder(F.pad(tokens, (0, PATCH**2)))
        time = timestep_embedding(t, tokens.shape[-1]).to(tokens.dtype)
        shared, vec = self.t_embedder(time), self.t_embedding_norm(time)
        if tokens.dtype == torch.float16:
            tokens = tokens.float()  # from block to block their sums pass fp16's range
        pe = image_rope(h // PATCH, w // PATCH, cast(Block, self.blocks[0]).self_attn.channels, x.device)
        for block in self.blocks:
            tokens = block(tokens, text, vec, shared, pe, seen)
        y = self.final_layer(tokens, vec, shared).unflatten(1, (h // PATCH, w // PATCH))
        y = y.unflatten(-1, (PATCH, PATCH, -1))  # (b, h, w, p, p, 16)
        velocity: Tensor = y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return velocity


def blocks(net: nn.Module) -> Sequence[nn.Module]:
    """The repeated blocks in forward order: those of the text adapter, then those of the image."""
    anima = cast(Anima, net)
    return [*anima.llm_adapter.blocks, *anima.blocks]


class Block(nn.Module):
    """The image attends to itself, then to the text, then goes through a two-layer net; each is modulated."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = (
            Attention(shapes, f"{name}.{kind}", "output_proj") for kind in ("self_attn", "cross_attn")
        )
        self.mlp = MLP(shapes, f"{name}.mlp", nn.GELU, ("layer1", "layer2"))
        self.adaln_modulation_self_attn, self.adaln_modulation_cross_attn, self.adaln_modulation_mlp = (
            _modulation(shapes, f"{name}.adaln_modulation_{kind}") for kind in ("self_attn", "cross_attn", "mlp")
        )

    def forward(self, x: Tensor, text: Tensor, vec: Tensor, shared: Tensor, pe: Tensor, seen: Tensor | None) -> Tensor:
        """x (b, n, c), text (b, m, d), the clock vec (b, c) and what all modulations have of it (b, 3c), rope of x,
        mask (b, 1, 1, m) -> (b, n, c)"""
        y, gate = _modulated(x, self.adaln_modulation_self_attn(vec) + shared)
        x = x + gate * self.self_attn(y, y, pe, pe)
        y, gate = _modulated(x, self.adaln_modulation_cross_attn(vec) + shared)
        x = x + gate * self.cross_attn(y, text, mask=seen)
        y, gate = _modulated(x, self.adaln_modulation_mlp(vec) + shared)
        x = x + gate * self.mlp(y)
        return x


class FinalLayer(nn.Module):
    """Tokens of the image -> patches."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.linear = linear(shapes, f"{name}.linear")
        self.adaln_modulation = _modulation(shapes, f"{name}.adaln_modulation")

    def forward(self, x: Tensor, vec: Tensor, shared: Tensor) -> Tensor:
        """x (b, n, c), clock as in `Block` -> (b, n, PATCH * PATCH * 16)"""
        shift, scale = (self.adaln_modulation(vec) + shared[:, : 2 * x.shape[-1]])[:, None].chunk(2, -1)
        y: Tensor = self.linear(modulate(x, shift, scale).to(vec.dtype))
        return y


class Attention(nn.Module):
    """Queries from one sequence, keys and values from the same or another; queries and keys are normed in each head,
    with 1e-6 as in NVIDIA's net, where diffusers has 1e-5."""

    def __init__(self, shapes: Shapes, name: str, out: str) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (linear(shapes, f"{name}.{part}_proj") for part in "qkv")
        self.channels = shapes[f"{name}.q_norm.weight"][0]
        if self.channels % 2 or self.q_proj.out_features % self.channels:
            raise UserError(f"{name}: {self.q_proj.out_features} channels cannot be cut into heads of {self.channels}")
        self.q_norm, self.k_norm = RMSNorm(self.channels), RMSNorm(self.channels)
        self.out = out
        self.add_module(out, linear(shapes, f"{name}.{out}"))

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        x_pe: Tensor | None = None,
        context_pe: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (b, n, c), context (b, m, d), the rope of both, mask (b, 1, 1, m) -> (b, n, c)"""
        q, k, v = (
            proj(y).unflatten(-1, (-1, self.channels)).transpose(1, 2)
            for proj, y in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if x_pe is not None and context_pe is not None:
            q, k = rotate_halves(q, x_pe), rotate_halves(k, context_pe)
        y: Tensor = self.get_submodule(self.out)(attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return y


# --- the text adapter ---


class TextAdapter(nn.Module):
    """T5's tokens of a caption, looked up in a table of its own, ask Qwen3's states of the same caption."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        rows, width = shapes[f"{name}.embed.weight"]
        self.embed = nn.Embedding(rows, width)
        self.in_proj = (
            linear(shapes, f"{name}.in_proj") if f"{name}.in_proj.weight" in shapes else nn.Identity()
        )  # where its width is not that of the table
        self.blocks = nn.ModuleList(AdapterBlock(shapes, block) for block in numbered(shapes, f"{name}.blocks"))
        self.out_proj = linear(shapes, f"{name}.out_proj")
        self.norm = _norm(shapes, f"{name}.norm")

    def forward(self, states: Tensor, ids: Tensor, states_mask: Tensor | None, ids_mask: Tensor | None) -> Tensor:
        """states (b, n, d), ids (b, m) and their masks -> (b, m, c), zero where ids are padding."""
        x, theirs = self.in_proj(self.embed(ids)), None
        if states_mask is not None:
            # A caption without a token has zeros to attend to, which say nothing, and not nothing, which is undefined.
            states = states.masked_fill(~states_mask[..., None], 0)
            theirs = (states_mask | ~states_mask.any(1, keepdim=True))[:, None, None]
        own = None if ids_mask is None else ids_mask[:, None, None]
        channels = cast(AdapterBlock, self.blocks[0]).self_attn.channels
        x_pe, states_pe = (text_rope(y.shape[1], channels, y.device) for y in (x, states))
        for block in self.blocks:
            x = block(x, states, x_pe, states_pe, own, theirs)
        y: Tensor = self.norm(self.out_proj(x))
        return y if ids_mask is None else y.masked_fill(~ids_mask[..., None], 0)


class AdapterBlock(nn.Module):
    """The tokens attend to themselves, then to Qwen3's states, then go through a two-layer net."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.norm_self_attn, self.norm_cross_attn, self.norm_mlp = (
            _norm(shapes, f"{name}.norm_{part}") for part in ("self_attn", "cross_attn", "mlp")
        )
        self.self_attn, self.cross_attn = (
            Attention(shapes, f"{name}.{kind}", "o_proj") for kind in ("self_attn", "cross_attn")
        )
        self.mlp = MLP(shapes, f"{name}.mlp", nn.GELU)

    def forward(
        self, x: Tensor, states: Tensor, x_pe: Tensor, states_pe: Tensor, own: Tensor | None, theirs: Tensor | None
    ) -> Tensor:
        """x (b, m, c), states (b, n, d), rope and mask (b, 1, 1, m or n) of each -> (b, m, c)"""
        y = self.norm_self_attn(x)
        x = x + self.self_attn(y, y, x_pe, x_pe, own)
        x = x + self.cross_attn(self.norm_cross_attn(x), states, x_pe, states_pe, theirs)
        x = x + self.mlp(self.norm_mlp(x))
        return x


# --- shared ---


def rows_seen(rows: int, ids_mask: Tensor | None) -> Tensor | None:
    """(b, 1, 1, rows): what the image attends to where captions of a batch have more than `ROWS` tokens: each its own
    rows, and never fewer than `ROWS`; None: everything."""
    if ids_mask is None or rows <= ROWS:
        return None
    own = ids_mask.sum(1, keepdim=True).clamp(min=ROWS)
    return (torch.arange(rows, device=ids_mask.device) < own)[:, None, None]


def image_rope(h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """(2, h * w, channels / 2): cosines and sines of the patches' places, of which the first third turns by the frame,
    here always the first, the others by row and column."""
    side = channels // 6 * 2
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    places = torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1)
    return rope(places, (channels - 2 * side, side, side), THETA * STRETCH ** (side / (side - 2)))


def text_rope(n: int, channels: int, device: torch.device) -> Tensor:
    """(2, n, channels / 2): those of the tokens of a text."""
    return rope(torch.arange(n, device=device)[:, None], (channels,), THETA)


def _norm(shapes: Shapes, name: str) -> RMSNorm:
    return RMSNorm(shapes[f"{name}.weight"][0])


def _modulation(shapes: Shapes, name: str) -> nn.Sequential:
    """(b, c) -> (b, shifts, scales and gates side by side), through few channels."""
    return nn.Sequential(nn.SiLU(), linear(shapes, f"{name}.1"), linear(shapes, f"{name}.2"))


def _modulated(x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """x (b, n, c) and its modulation (b, 3c) -> x scaled and shifted, in the format of the modulation, and the gate (b,
    1, c) of what is made of it, in that of x."""
    shift, scale, gate = modulation[:, None].chunk(3, -1)
    return modulate(x, shift, scale).to(modulation.dtype), gate.to(x.dtype)


def _nested(module: nn.Module, *names: str) -> nn.Sequential:
    """A layer under names that stand within one another."""
    for name in reversed(names):
        module = nn.Sequential(OrderedDict({name: module}))
    return cast(nn.Sequential, module)
