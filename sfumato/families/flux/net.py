"""The transformer of FLUX.1, in the names of its checkpoints.

Every part reads its sizes off the shapes of its tensors, so a tiny model, a pruned one and the real one take the
same path. Architecture: Black Forest Labs 2024 (github.com/black-forest-labs/flux): text and image are one sequence of
tokens in every attention, in the blocks of two streams after Esser et al. 2024 (arXiv:2403.03206), then in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
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
    modulation,
    numbered,
    split_heads,
    timestep_embedding,
)
from sfumato.tensors.attention import attention
from sfumato.tensors.rope import rope, rotate

Modulation = Callable[[Shapes, str], nn.Module]
"""(shapes, name of a layer) -> what makes (b, n, c), n shifts, scales and gates, of a block's `vec`."""

PATCH = 2
"""A token of the image is a square of so many latents."""
THETA = 10_000


class FluxTrunk(Denoiser):
    """Tokens of image and text, and the blocks that they pass: what denoisers and their control nets share."""

    def __init__(self, shapes: Shapes, modulation: Modulation) -> None:
        super().__init__(shapes)
        width, head = shapes["img_in.weight"][0], shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        if head % 2 or width % head:
            raise UserError(f"the transformer has {width} channels, which cannot be cut into heads of {head}")
        self.axes = axes(head)
        self.img_in, self.txt_in = linear(shapes, "img_in"), linear(shapes, "txt_in")
        self.double_blocks = nn.ModuleList(
            DoubleBlock(shapes, name, modulation) for name in numbered(shapes, "double_blocks")
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(shapes, name, modulation) for name in numbered(shapes, "single_blocks")
        )

    def states(
        self,
        img: Tensor,
        context: Tensor,
        size: tuple[int, int],
        double: Iterable[tuple[Tensor, Tensor]],
        single: Iterable[Tensor],
        mask: Tensor | None,
    ) -> Iterator[Tensor]:
        """The tokens of the image (b, h * w, c) after each block.

        img: the same before the first; context (b, n, d), size (h, w), `vec` of each block, mask (b, n) or None.
        """
        txt = self.txt_in(context)
        pe = rope(positions(txt.shape[1], *size, img.device), self.axes, THETA)
        # Without a mask none is made: kernels that take no mask stay usable.
        attn_mask = (
            None if mask is None else torch.cat([mask, mask.new_ones(img.shape[:2])], 1)[:, None, None]
        )  # (b, 1, 1, n + m)
        for block, (img_vec, txt_vec) in zip(self.double_blocks, double, strict=True):
            img, txt = block(img, txt, img_vec, txt_vec, pe, attn_mask)
            yield img
        tokens = torch.cat([txt, img], 1)
        for block, vec in zip(self.single_blocks, single, strict=True):
            tokens = block(tokens, vec, pe, attn_mask)
            yield tokens[:, txt.shape[1] :]


class FluxBase(FluxTrunk):
    """What FLUX and Chroma share: all but where the modulation comes from."""

    def __init__(self, shapes: Shapes, modulation: Modulation) -> None:
        super().__init__(shapes, modulation)
        self.final_layer = FinalLayer(shapes, "final_layer", modulation)

    def forward_blocks(
        self,
        x: Tensor,
        context: Tensor,
        double: Iterable[tuple[Tensor, Tensor]],
        single: Iterable[Tensor],
        last: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """x (b, c, h, w), context (b, n, d), `vec` of each block and of the last layer, mask (b, n) or None -> (b, c',
        h, w)."""
        size = patches(x)
        img: Tensor = self.img_in(pack(x))
        for state in self.states(img, context, size, double, single, mask):
            img = state
        return unpack(self.final_layer(img, last), *x.shape[-2:])


class Flux(FluxBase):
    """x (b, 16, h, w), t (b,), context (b, n, 4096), y (b, 768), guidance (b,) -> (b, 16, h, w); even h and w."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, modulation)
        self.time_in, self.vector_in = embedder(shapes, "time_in"), embedder(shapes, "vector_in")
        # The distilled dev has it, schnell has not.
        self.guidance_in = guidance_embedder(shapes)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The predicted velocity, shaped as x, at time t in [0, 1] (1: noise alone).

        context: states of T5. y: the pooled caption of CLIP. guidance: for a net with `guidance_in`, and only for that.
        mask: (b, n) bool, False for tokens of the text that no token attends to; None: all are attended to.
        """
        if (guidance is None) != (self.guidance_in is None):
            raise ValueError(
                f"guidance is {guidance}, but the net {'has no' if self.guidance_in is None else 'has a'} guidance_in"
            )
        vec = embed(self, t, y, guidance, x.dtype)
        return self.forward_blocks(
            x, context, [(vec, vec)] * len(self.double_blocks), [vec] * len(self.single_blocks), vec, mask
        )


class Embedders(Protocol):
    """Of what a forward is conditioned on besides the text's tokens."""

    time_in: MLP
    vector_in: MLP
    guidance_in: MLP | None


def embed(net: Embedders, t: Tensor, y: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
    """t (b,), y (b, d), guidance (b,) or None -> `vec` (b, c) of every block."""
    vec: Tensor = net.time_in(timestep_embedding(1000 * t.float(), net.time_in.in_features).to(dtype))
    vec = vec + net.vector_in(y)
    if net.guidance_in is not None and guidance is not None:
        vec = vec + net.guidance_in(timestep_embedding(1000 * guidance.float(), net.guidance_in.in_features).to(dtype))
    return vec


class DoubleBlock(nn.Module):
    """Image and text, each with its own weights, meet in one attention."""

    def __init__(self, shapes: Shapes, name: str, modulation: Modulation) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = (modulation(shapes, f"{name}.{side}_mod.lin") for side in ("img", "txt"))
        self.img_attn, self.txt_attn = (SelfAttention(shapes, f"{name}.{side}_attn") for side in ("img", "txt"))
        self.img_mlp, self.txt_mlp = (MLP(shapes, f"{name}.{side}_mlp", GELU) for side in ("img", "txt"))

    def forward(
        self, img: Tensor, txt: Tensor, img_vec: Tensor, txt_vec: Tensor, pe: Tensor, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """img (b, m, c), txt (b, n, c), input of both modulations, rope and mask of the n + m tokens -> img, txt"""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(img_vec).split(
            1, 1
        )  # (b, 1, c) each
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(txt_vec).split(1, 1)
        of_txt = self.txt_attn.heads(modulate(txt, txt_shift1, txt_scale1))
        of_img = self.img_attn.heads(modulate(img, img_shift1, img_scale1))
        q, k, v = (torch.cat(parts, 2) for parts in zip(of_txt, of_img, strict=True))
        txt_y, img_y = torch.split(attend(q, k, v, pe, attn_mask), [txt.shape[1], img.shape[1]], 1)
        img = img + img_gate1 * self.img_attn.proj(img_y)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_y)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and a two-layer net side by side, over text and image as one sequence."""

    def __init__(self, shapes: Shapes, name: str, modulation: Modulation) -> None:
        super().__init__()
        self.modulation = modulation(shapes, f"{name}.modulation.lin")
        self.linear1, self.linear2 = linear(shapes, f"{name}.linear1"), linear(shapes, f"{name}.linear2")
        self.norm = QKNorm(shapes, f"{name}.norm")

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, attn_mask: Tensor | None) -> Tensor:
        """x (b, n, c), input of the modulation, rope and mask of the n tokens -> (b, n, c)"""
        shift, scale, gate = self.modulation(vec).split(1, 1)
        y = self.linear1(modulate(x, shift, scale))
        qkv, hidden = y.split([3 * x.shape[-1], y.shape[-1] - 3 * x.shape[-1]], -1)
        q, k, v = self.norm(qkv)
        y = torch.cat([attend(q, k, v, pe, attn_mask), F.gelu(hidden, approximate="tanh")], -1)
        x = x + gate * self.linear2(y)
        return x


class FinalLayer(nn.Module):
    """Tokens of the image -> patches."""

    def __init__(self, shapes: Shapes, name: str, modulation: Modulation) -> None:
        super().__init__()
        self.linear = linear(shapes, f"{name}.linear")
        self.adaLN_modulation = modulation(shapes, f"{name}.adaLN_modulation.1")

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x (b, m, c), input of the modulation -> (b, m, channels * PATCH * PATCH)"""
        shift, scale = self.adaLN_modulation(vec).split(1, 1)
        y: Tensor = self.linear(modulate(x, shift, scale))
        return y


class SelfAttention(nn.Module):
    """One stream's way into the attention and out of it."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.qkv, self.proj = linear(shapes, f"{name}.qkv"), linear(shapes, f"{name}.proj")
        self.norm = QKNorm(shapes, f"{name}.norm")

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, n, c) -> q, k, v (b, heads, n, d)"""
        q, k, v = self.norm(self.qkv(x))
        return q, k, v


class QKNorm(nn.Module):
    """qkv (b, n, 3c) -> q, k, v (b, heads, n, d), with q and k normed within each head."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.query_norm, self.key_norm = (
            RMSNorm(shapes[f"{name}.{side}_norm.scale"][0], "scale") for side in ("query", "key")
        )
        self.channels = shapes[f"{name}.query_norm.scale"][0]

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        q, k, v = split_heads(qkv, self.channels)
        return self.query_norm(q), self.key_norm(k), v


def blocks(net: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a `FluxTrunk` in forward order: those of two streams, then those of one."""
    trunk = cast(FluxTrunk, net)
    return [*trunk.double_blocks, *trunk.single_blocks]


def embedder(shapes: Shapes, name: str) -> MLP:
    """(b, n) -> (b, c)"""
    return MLP(shapes, name, names=("in_layer", "out_layer"))


def guidance_embedder(shapes: Shapes) -> MLP | None:
    """That of a net that takes a guidance."""
    return embedder(shapes, "guidance_in") if any(name.startswith("guidance_in.") for name in shapes) else None


def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, attn_mask: Tensor | None) -> Tensor:
    """q, k, v (b, heads, n, d), their rope and mask -> (b, n, heads * d)"""
    return attention(rotate(q, pe), rotate(k, pe), v, attn_mask).transpose(1, 2).flatten(2)


def axes(head: int) -> tuple[int, int, int]:
    """Channels of a head that turn by (0, y, x): (16, 56, 56) of FLUX's 128; other heads in the same ratio, in even
    numbers."""
    side = 7 * head // 32 * 2
    return head - 2 * side, side, side


def positions(text: int, h: int, w: int, device: torch.device) -> Tensor:
    """(text + h * w, 3): (0, 0, 0) for every token of the text, then (0, y, x) for those of the image."""
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    image = torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1)
    return F.pad(image, (0, 0, text, 0))


def patches(x: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of latents x (b, c, h, w). Errors: `UserError` for odd sides."""
    h, w = x.shape[-2:]
    if h % PATCH or w % PATCH:
        raise UserError(
            f"latents of {h} x {w} cannot be cut into patches of {PATCH} x {PATCH}: both sides must be even"
        )
    return h // PATCH, w // PATCH


def pack(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h/2 * w/2, c * 2 * 2)"""
    return F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpack(x: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`, to (b, c, h, w)."""
    return F.pixel_shuffle(torch.unflatten(x.transpose(1, 2), 2, (h // PATCH, w // PATCH)), PATCH)


def transformer_config(net: FluxTrunk, kind: str) -> dict[str, Any]:
    """What diffusers' class `kind` has in its config of a transformer like this one."""
    width = net.img_in.out_features
    return {
        "_class_name": kind,
        "patch_size": 1,
        "in_channels": net.img_in.in_features,
        "num_layers": len(net.double_blocks),
        "num_single_layers": len(net.single_blocks),
        "attention_head_dim": sum(net.axes),
        "num_attention_heads": width // sum(net.axes),
        "joint_attention_dim": net.txt_in.in_features,
        "axes_dims_rope": list(net.axes),
    }
