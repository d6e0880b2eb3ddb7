"""The U-Net of Stable Diffusion 1.x and 2.x, in the names of its checkpoints; what is also XL's stands in `UNetBase`.

Every part reads its sizes off the shapes of its tensors, so a tiny model and the real one take the same
path. Architecture: Rombach et al. 2022 (arXiv:2112.10752); the names are those of its first code (LDM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.models.layers import MLP, Denoiser, Shapes, linear, numbered, timestep_embedding
from sfumato.tensors.attention import attention

CONV_HEADS = 8
"""Heads of every attention where `proj_in` is a convolution (1.x)."""
LINEAR_HEAD_WIDTH = 64
"""Channels of a head where `proj_in` is a linear layer (2.x and XL)."""


class WayDown(Denoiser):
    """The first half of a U-Net, which ControlNets have as well."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.channels = shapes["input_blocks.0.0.weight"][0]
        self.time_embed = MLP(shapes, "time_embed")
        self.input_blocks = nn.ModuleList(Block(shapes, name) for name in numbered(shapes, "input_blocks"))
        self.middle_block = Block(shapes, "middle_block")

    def time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (b,) -> (b, e)"""
        emb: Tensor = self.time_embed(timestep_embedding(t, self.channels).to(dtype))
        return emb


class UNetBase(WayDown):
    """The way down and up again; a family's U-Net makes the embedding that every block takes."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.output_blocks = nn.ModuleList(Block(shapes, name) for name in numbered(shapes, "output_blocks"))
        self.out = nn.Sequential(_norm(shapes, "out.0"), nn.SiLU(), conv(shapes, "out.2"))

    def forward_blocks(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """x (b, 4, h, w), emb (b, e), context (b, n, d) -> (b, 4, h, w)"""
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], 1)
            # An odd size was rounded up on the way down: the way up goes to the size of the next skip.
            x = block(x, emb, context, skips[-1].shape[-2:] if skips else None)
        prediction: Tensor = self.out(x)
        return prediction


class UNet(UNetBase):
    """x (b, 4, h, w), t (b,), context (b, n, d) -> (b, 4, h, w); any h and w."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The prediction, noise or velocity, for x at time t; shaped as x."""
        return self.forward_blocks(x, self.time(t, x.dtype), context)


def blocks(net: nn.Module) -> Sequence[nn.Module]:
    """A U-Net's blocks; the first, a single convolution, is left out."""
    unet = cast(UNetBase, net)
    return [*list(unet.input_blocks)[1:], unet.middle_block, *unet.output_blocks]


def readers(net: nn.Module) -> dict[str, nn.Module]:
    """The blocks that attend to the text, by the names of XTI (arXiv:2303.09522): IN01 ... MID, OUT03 ..."""
    unet = cast(UNetBase, net)
    named = [(f"IN{i:02}", block) for i, block in enumerate(unet.input_blocks)]
    named += [("MID", unet.middle_block), *((f"OUT{i:02}", block) for i, block in enumerate(unet.output_blocks))]
    return {name: block for name, block in named if any(isinstance(part, Transformer) for part in block.children())}


class Block(nn.Module):
    """What stands between two skips: parts called 0, 1, 2, each known by the names of its tensors."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        for i, part in enumerate(numbered(shapes, name)):
            self.add_module(str(i), _part(shapes, part))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """x (b, c, h, w), emb (b, e), context (b, n, d) -> (b, c', h', w'); `size`: (h', w') of an upsampling."""
        for part in self.children():
            if isinstance(part, ResBlock):
                x = part(x, emb)
            elif isinstance(part, Transformer):
                x = part(x, context)
            elif isinstance(part, Upsample):
                x = part(x, size)
            else:
                x = part(x)
        return x


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, beside a skip."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            _norm(shapes, f"{name}.in_layers.0"), nn.SiLU(), conv(shapes, f"{name}.in_layers.2")
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(shapes, f"{name}.emb_layers.1"))
        # The third place was a dropout of 0.
        self.out_layers = nn.Sequential(
            _norm(shapes, f"{name}.out_layers.0"), nn.SiLU(), nn.Identity(), conv(shapes, f"{name}.out_layers.3")
        )
        skip = f"{name}.skip_connection"
        self.skip_connection = conv(shapes, skip) if f"{skip}.weight" in shapes else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (b, c, h, w), emb (b, e) -> (b, c', h, w)"""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        y: Tensor = self.skip_connection(x) + self.out_layers(h)
        return y


class Transformer(nn.Module):
    """Transformer blocks over the pixels of x, beside a skip."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.norm = _norm(shapes, f"{name}.norm", eps=1e-6)
        self.linear = len(shapes[f"{name}.proj_in.weight"]) == 2
        project = linear if self.linear else conv
        self.proj_in, self.proj_out = (project(shapes, f"{name}.{side}") for side in ("proj_in", "proj_out"))
        width = shapes[f"{name}.proj_in.weight"][0]
        heads = width // LINEAR_HEAD_WIDTH if self.linear else CONV_HEADS
        if not heads or width % heads:
            cut = f"heads of {LINEAR_HEAD_WIDTH}" if self.linear else f"{CONV_HEADS} heads"
            raise UserError(f"the U-Net has an attention of {width} channels, which cannot be cut into {cut}")
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(shapes, block, heads) for block in numbered(shapes, f"{name}.transformer_blocks")
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (b, c, h, w), context (b, n, d) -> (b, c, h, w)"""
        y = self.norm(x)
        y = self.proj_in(_pixels(y)) if self.linear else _pixels(self.proj_in(y))
        for block in self.transformer_blocks:
            y = block(y, context)
        y = _image(self.proj_out(y), x) if self.linear else self.proj_out(_image(y, x))
        return x + y


class TransformerBlock(nn.Module):
    """Attention among the pixels, attention to the text, and a gated two-layer net."""

    def __init__(self, shapes: Shapes, name: str, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(shapes, f"{name}.attn1", heads)
        self.attn2 = Attention(shapes, f"{name}.attn2", heads)
        self.ff = FeedForward(shapes, f"{name}.ff")
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(shapes[f"{name}.norm{i}.weight"]) for i in (1, 2, 3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (b, pixels, c), context (b, n, d) -> (b, pixels, c)"""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return x


class Attention(nn.Module):
    """Queries from x, keys and values from the context."""

    def __init__(self, shapes: Shapes, name: str, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (linear(shapes, f"{name}.{part}") for part in ("to_q", "to_k", "to_v"))
        self.to_out = nn.Sequential(linear(shapes, f"{name}.to_out.0"))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (b, n, c), context (b, m, d) -> (b, n, c)"""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y: Tensor = self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class FeedForward(nn.Module):
    """A gated linear unit (GEGLU, arXiv:2002.05202) and a linear layer."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        # The second place was a dropout of 0.
        self.net = nn.Sequential(GatedGelu(shapes, f"{name}.net.0"), nn.Identity(), linear(shapes, f"{name}.net.2"))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, c)"""
        y: Tensor = self.net(x)
        return y


class GatedGelu(nn.Module):
    """x -> a * gelu(b), where a and b are the halves of one projection."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.proj = linear(shapes, f"{name}.proj")

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, 4c)"""
        a, b = self.proj(x).chunk(2, -1)
        y: Tensor = a * F.gelu(b)
        return y


class Downsample(nn.Module):
    """Half the size, rounded up."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.op = conv(shapes, f"{name}.op", stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h / 2, w / 2)"""
        y: Tensor = self.op(x)
        return y


class Upsample(nn.Module):
    """Nearest pixels, then a convolution."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.conv = conv(shapes, f"{name}.conv")

    def forward(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        """(b, c, h, w) -> (b, c, *size)"""
        y: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return y


PARTS: Mapping[str, Callable[[Shapes, str], nn.Module]] = {
    "in_layers.0": ResBlock,
    "proj_in": Transformer,
    "op": Downsample,
    "conv": Upsample,
}
"""A layer by which a part of a block is known -> the part."""


def _part(shapes: Shapes, name: str) -> nn.Module:
    """The part that has tensors of these names; a convolution if there is nothing below its name."""
    return next((part for layer, part in PARTS.items() if f"{name}.{layer}.weight" in shapes), conv)(shapes, name)


def _pixels(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h * w, c)"""
    return x.flatten(2).transpose(1, 2)


def _image(x: Tensor, like: Tensor) -> Tensor:
    """(b, h * w, c) -> (b, c, h, w)"""
    return x.transpose(1, 2).reshape(*x.shape[:1], -1, *like.shape[-2:])


def conv(shapes: Shapes, name: str, stride: int = 1) -> nn.Conv2d:
    """The convolution of this name, which keeps the size, or divides it by `stride`."""
    out, into, kernel, _ = shapes[f"{name}.weight"]
    return nn.Conv2d(into, out, kernel, stride=stride, padding=kernel // 2)


def _norm(shapes: Shapes, name: str, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(32, shapes[f"{name}.weight"][0], eps=eps)
