"""The transformer of HunyuanImage-2.1, in the names of its checkpoints.

Every part reads its sizes off the shapes of its tensors, so a tiny model, a pruned one and the real ones take the same
path. Architecture: Tencent 2025 (github.com/Tencent-Hunyuan/HunyuanImage-2.1), after Esser et al. 2024
(arXiv:2403.03206) and FLUX.1: image and text are one sequence of tokens in every attention, in the blocks of two
streams, then in one. The text's states pass blocks of their own first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.models.layers import (
    EPS,
    GELU,
    MLP,
    Denoiser,
    RMSNorm,
    Shapes,
    linear,
    modulate,
    modulation,
    numbered,
    split_heads,
    timestep_embedding,
)
from sfumato.tensors.attention import attention
from sfumato.tensors.rope import rope, rotate

THETA = 256
GUIDANCE_SCALE = 1000
"""The guidance is embedded as a time is, so it comes times this."""


class HunyuanImage(Denoiser):
    """x (b, 64, h, w), t (b,) in [0, 1000], text (b, n, 3584), glyphs (b, m, 1472) -> (b, 64, h, w)."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        (width, channels, *patch), head = (
            shapes["img_in.proj.weight"],
            shapes["double_blocks.0.img_attn_q_norm.weight"][0],
        )
        if patch != [1, 1]:
            raise UserError(f"img_in.proj.weight: patches of {' x '.join(map(str, patch))}; 1 x 1 was expected")
        if head % 4 or width % head:
            raise UserError(f"the transformer has {width} channels, which cannot be cut into heads of {head}")
        self.axes, self.theta = (head // 2, head // 2), THETA
        self.img_in = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, width, 1)))
        self.txt_in = TextIn(shapes, "txt_in", width // head)
        self.byt5_in = GlyphsIn(shapes, "byt5_in")
        self.time_in = Embedder(shapes, "time_in")
        # Distilled models have both of these.
        self.guidance_in, self.time_r_in = (
            Embedder(shapes, name) if f"{name}.mlp.0.weight" in shapes else None
            for name in ("guidance_in", "time_r_in")
        )
        self.double_blocks = nn.ModuleList(DoubleBlock(shapes, name) for name in numbered(shapes, "double_blocks"))
        self.single_blocks = nn.ModuleList(SingleBlock(shapes, name) for name in numbered(shapes, "single_blocks"))
        self.final_layer = FinalLayer(shapes, "final_layer")

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        glyphs: Tensor,
        text_mask: Tensor | None = None,
        glyphs_mask: Tensor | None = None,
        guidance: Tensor | None = None,
        t_next: Tensor | None = None,
    ) -> Tensor:
        """The velocity from image to noise at x, shaped as x.

        text: states of the vision-language model; glyphs: of byT5, for the text that the image shows, which may be none
        (m = 0). Masks (b, n), (b, m): True for tokens, None where all are. guidance (b,): for a net with `guidance_in`,
        and only for that. t_next (b,): for a net with `time_r_in`, the velocity is the mean of that from t to t_next
        (arXiv:2505.13447); None: t, which is the velocity at x.
        """
        h, w = x.shape[-2:]
        vec = self._vec(x.dtype, t, guidance, t_next)
        img = self.img_in(x).flatten(2).transpose(1, 2)
        # Tokens of text have no place, so neither their order counts nor where padding lies.
        txt = torch.cat([self.byt5_in(glyphs), self.txt_in(text, t, text_mask)], 1)
        masks = [(glyphs, glyphs_mask), (text, text_mask)]
        mask = None  # without one, kernels that take no mask stay usable
        if any(m is not None for _, m in masks):
            seen = [torch.ones(s.shape[:2], dtype=torch.bool, device=s.device) if m is None else m for s, m in masks]
            mask = torch.cat([seen[0].new_ones(img.shape[:2]), *seen], 1)[:, None, None]  # (b, 1, 1, h * w + m + n)
        pe = rope(positions(h, w, txt.shape[1], x.device), self.axes, self.theta)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe, mask)
        tokens = torch.cat([img, txt], 1)
        for block in self.single_blocks:
            tokens = block(tokens, vec, pe, mask)
        velocity: Tensor = self.final_layer(tokens[:, : h * w], vec)
        return torch.unflatten(velocity.transpose(1, 2), 2, (h, w))

    def _vec(self, dtype: torch.dtype, t: Tensor, guidance: Tensor | None, t_next: Tensor | None) -> Tensor:
        """What every block is modulated by, (b, c)."""
        if (guidance is None) != (self.guidance_in is None):
            raise ValueError(
                f"guidance is {guidance}, but the net {'has no' if self.guidance_in is None else 'has a'} guidance_in"
            )
        vec = self.time_in(t, dtype)
        if self.time_r_in is not None:
            vec = (vec + self.time_r_in(t if t_next is None else t_next, dtype)) / 2
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(GUIDANCE_SCALE * guidance.float(), dtype)
        return cast(Tensor, vec)


class Embedder(nn.Module):
    """Times (b,), in fp32 whatever the net is in -> (b, c) in `dtype`."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.mlp = MLP(shapes, f"{name}.mlp")

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """See the class."""
        out: Tensor = self.mlp(timestep_embedding(t, self.mlp.in_features).to(dtype))
        return out


class TextIn(nn.Module):
    """States of the vision-language model (b, n, d) -> tokens (b, n, c): they attend to one another, by the time and by
    what they are on the whole."""

    def __init__(self, shapes: Shapes, name: str, heads: int) -> None:
        super().__init__()
        self.t_embedder = Embedder(shapes, f"{name}.t_embedder")
        self.c_embedder = MLP(shapes, f"{name}.c_embedder", names=("linear_1", "linear_2"))
        self.input_embedder = linear(shapes, f"{name}.input_embedder")
        inner = f"{name}.individual_token_refiner"
        self.individual_token_refiner = nn.ModuleDict(
            {
                "blocks": nn.ModuleList(
                    RefinerBlock(shapes, block, heads) for block in numbered(shapes, f"{inner}.blocks")
                )
            }
        )

    @property
    def blocks(self) -> nn.ModuleList:
        """In forward order."""
        return cast(nn.ModuleList, self.individual_token_refiner["blocks"])

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        """`t` (b,), `mask` (b, n): True for tokens, None where all are."""
        if mask is None:
            mean = x.mean(1)
        else:
            used = mask[..., None].float()
            mean = ((x * used).sum(1) / used.sum(1)).to(x.dtype)
            mask = mask[:, None, None]  # (b, 1, 1, n)
        vec = self.t_embedder(t, x.dtype) + self.c_embedder(mean)
        x = self.input_embedder(x)
        for block in self.blocks:
            x = block(x, vec, mask)
        return x


class RefinerBlock(nn.Module):
    """Self-attention and a two-layer net, with gates alone as modulation."""

    def __init__(self, shapes: Shapes, name: str, heads: int) -> None:
        super().__init__()
        width = shapes[f"{name}.norm1.weight"][0]
        self.channels = width // heads
        self.norm1, self.norm2 = LayerNorm(width, EPS), LayerNorm(width, EPS)
        self.self_attn_qkv, self.self_attn_proj = (
            linear(shapes, f"{name}.self_attn_{part}") for part in ("qkv", "proj")
        )
        self.mlp = MLP(shapes, f"{name}.mlp", names=("fc1", "fc2"))
        self.adaLN_modulation = modulation(shapes, f"{name}.adaLN_modulation.1")

    def forward(self, x: Tensor, vec: Tensor, mask: Tensor | None) -> Tensor:
        """x (b, n, c), input of the modulation, mask of the n tokens -> (b, n, c)"""
        gate1, gate2 = self.adaLN_modulation(vec).split(1, 1)  # (b, 1, c) each
        y = attention(*split_heads(self.self_attn_qkv(self.norm1(x)), self.channels), mask)
        x = x + gate1 * self.self_attn_proj(y.transpose(1, 2).flatten(2))
        x = x + gate2 * self.mlp(self.norm2(x))
        return x


class GlyphsIn(nn.Module):
    """States of byT5 (b, m, d) -> tokens (b, m, c)."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.layernorm = LayerNorm(shapes[f"{name}.layernorm.weight"][0])
        self.fc1, self.fc2, self.fc3 = (linear(shapes, f"{name}.fc{i}") for i in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(self.layernorm(x))))))
        return out


class LayerNorm(nn.LayerNorm):
    """In fp32, whatever formats weights and input are in, which differ where text is kept in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., c) -> (..., c)"""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


class DoubleBlock(nn.Module):
    """Image and text, each with its own weights, meet in one attention."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        img, txt = f"{name}.img", f"{name}.txt"
        self.img_mod, self.txt_mod = (modulation(shapes, f"{side}_mod.linear") for side in (img, txt))
        self.img_attn_qkv, self.txt_attn_qkv = (linear(shapes, f"{side}_attn_qkv") for side in (img, txt))
        self.img_attn_q_norm, self.txt_attn_q_norm = (norm(shapes, f"{side}_attn_q_norm") for side in (img, txt))
        self.img_attn_k_norm, self.txt_attn_k_norm = (norm(shapes, f"{side}_attn_k_norm") for side in (img, txt))
        self.img_attn_proj, self.txt_attn_proj = (linear(shapes, f"{side}_attn_proj") for side in (img, txt))
        self.img_mlp, self.txt_mlp = (MLP(shapes, f"{side}_mlp", GELU, ("fc1", "fc2")) for side in (img, txt))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """img (b, m, c), txt (b, n, c), input of both modulations, rope and mask of the m + n tokens -> img, txt"""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec).split(1, 1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec).split(1, 1)
        of_img = self.img_attn_qkv(modulate(img, img_shift1, img_scale1))
        of_txt = self.txt_attn_qkv(modulate(txt, txt_shift1, txt_scale1))
        pairs = zip(
            heads(of_img, self.img_attn_q_norm, self.img_attn_k_norm),
            heads(of_txt, self.txt_attn_q_norm, self.txt_attn_k_norm),
            strict=True,
        )
        q, k, v = (torch.cat(pair, 2) for pair in pairs)
        img_y, txt_y = torch.split(attend(q, k, v, pe, attn_mask), [img.shape[1], txt.shape[1]], 1)
        img = img + img_gate1 * self.img_attn_proj(img_y)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn_proj(txt_y)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and a two-layer net side by side, over image and text as one sequence."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.modulation = modulation(shapes, f"{name}.modulation.linear")
        self.linear1, self.linear2 = linear(shapes, f"{name}.linear1"), linear(shapes, f"{name}.linear2")
        self.q_norm, self.k_norm = norm(shapes, f"{name}.q_norm"), norm(shapes, f"{name}.k_norm")

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, attn_mask: Tensor | None) -> Tensor:
        """x (b, n, c), input of the modulation, rope and mask of the n tokens -> (b, n, c)"""
        shift, scale, gate = self.modulation(vec).split(1, 1)
        y = self.linear1(modulate(x, shift, scale))
        qkv, hidden = y.split([3 * x.shape[-1], y.shape[-1] - 3 * x.shape[-1]], -1)
        attended = attend(*heads(qkv, self.q_norm, self.k_norm), pe, attn_mask)
        x = x + gate * self.linear2(torch.cat([attended, F.gelu(hidden, approximate="tanh")], -1))
        return x


class FinalLayer(nn.Module):
    """Tokens of the image -> latents."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.linear = linear(shapes, f"{name}.linear")
        self.adaLN_modulation = modulation(shapes, f"{name}.adaLN_modulation.1")

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x (b, m, c), input of the modulation -> (b, m, 64)"""
        shift, scale = self.adaLN_modulation(vec).split(1, 1)
        y: Tensor = self.linear(modulate(x, shift, scale))
        return y


def blocks(net: nn.Module) -> Sequence[nn.Module]:
    """The repeated blocks in forward order: those of the text, those of two streams, then those of one."""
    own = cast(HunyuanImage, net)
    return [*own.txt_in.blocks, *own.double_blocks, *own.single_blocks]


def norm(shapes: Shapes, name: str) -> RMSNorm:
    """The norm of queries or keys within each head."""
    return RMSNorm(shapes[f"{name}.weight"][0])


def heads(qkv: Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Fused (b, n, 3c) -> q, k, v (b, heads, n, d), with q and k normed."""
    q, k, v = split_heads(qkv, q_norm.channels)
    return q_norm(q), k_norm(k), v


def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, attn_mask: Tensor | None) -> Tensor:
    """q, k, v (b, heads, n, d), their rope and mask -> (b, n, heads * d)"""
    return attention(rotate(q, pe), rotate(k, pe), v, attn_mask).transpose(1, 2).flatten(2)


def positions(h: int, w: int, text: int, device: torch.device) -> Tensor:
    """(h * w + text, 2): (y, x) for tokens of the image, then (0, 0), which turns nothing, for those of the text."""
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return F.pad(torch.stack([y, x], -1).flatten(0, 1), (0, 0, 0, text))
