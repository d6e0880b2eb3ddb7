"""The U-Net of Stable Diffusion 1.x and 2.x, in the names of its checkpoints; what is also XL's stands in `Body`.

Every part reads its sizes off the shapes of its tensors, so a tiny model and the real one take the same
path. Architecture: Rombach et al. 2022 (arXiv:2112.10752); the names are those of its first code (LDM).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.models.layers import Shapes, linear, timestep_embedding
from sfumato.tensors.attention import attention

CONV_HEADS = 8
"""Heads of every attention where `proj_in` is a convolution (1.x)."""
LINEAR_HEAD_WIDTH = 64
"""Channels of a head where `proj_in` is a linear layer (2.x and XL)."""

Net = TypeVar("Net", bound="Body")


class Body(nn.Module):
    """The way down and up again; a family's U-Net says what the embedding is made of that every block gets."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.channels = shapes["input_blocks.0.0.weight"][0]
        self.time_embed = embedder(shapes, "time_embed")
        self.input_blocks = nn.ModuleList(Block(part) for part in _numbered(shapes, "input_blocks"))
        self.middle_block = Block(_below(shapes, "middle_block"))
        self.output_blocks = nn.ModuleList(Block(part) for part in _numbered(shapes, "output_blocks"))
        self.out = nn.Sequential(_norm(shapes, "out.0"), nn.SiLU(), _conv(shapes, "out.2"))

    @classmethod
    def of(cls: type[Net], shapes: Shapes) -> Net:
        """A net without values (on the meta device) for tensors of these shapes; `UserError` if one that sizes are read
        from is missing."""
        try:
            with torch.device("meta"):
                return cls(shapes)
        except KeyError as missing:
            raise UserError(
                f"the U-Net lacks the tensor {missing}: the file is incomplete or of another kind"
            ) from None

    def time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (b,) -> (b, e)"""
        emb: Tensor = self.time_embed(timestep_embedding(t, self.channels).to(dtype))
        return emb

    def walk(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
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
        said: Tensor = self.out(x)
        return said


class UNet(Body):
    """x (b, 4, h, w), t (b,), context (b, n, d) -> (b, 4, h, w); any h and w."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """What the net says about x at time t: noise or velocity, shaped as x."""
        return self.walk(x, self.time(t, x.dtype), context)


def blocks(net: nn.Module) -> Sequence[nn.Module]:
    """A U-Net's blocks; the first, a single convolution, is left out."""
    body = cast(Body, net)
    return [*list(body.input_blocks)[1:], body.middle_block, *body.output_blocks]


class Block(nn.Module):
    """What stands between two skips: parts called 0, 1, 2, each known by the names of its tensors."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for i, part in enumerate(_numbered(shapes)):
            self.add_module(str(i), _part(part))

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

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(_norm(shapes, "in_layers.0"), nn.SiLU(), _conv(shapes, "in_layers.2"))
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(shapes, "emb_layers.1"))
        # The third place was a dropout of 0.
        self.out_layers = nn.Sequential(
            _norm(shapes, "out_layers.0"), nn.SiLU(), nn.Identity(), _conv(shapes, "out_layers.3")
        )
        self.skip_connection = _conv(shapes, "skip_connection") if "skip_connection.weight" in shapes else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (b, c, h, w), emb (b, e) -> (b, c', h, w)"""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        y: Tensor = self.skip_connection(x) + self.out_layers(h)
        return y


class Transformer(nn.Module):
    """Transformer blocks over the pixels of x, beside a skip."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.norm = _norm(shapes, "norm", eps=1e-6)
        self.linear = len(shapes["proj_in.weight"]) == 2
        project = linear if self.linear else _conv
        self.proj_in, self.proj_out = project(shapes, "proj_in"), project(shapes, "proj_out")
        width = shapes["proj_in.weight"][0]
        heads = width // LINEAR_HEAD_WIDTH if self.linear else CONV_HEADS
        if not heads or width % heads:
            cut = f"heads of {LINEAR_HEAD_WIDTH}" if self.linear else f"{CONV_HEADS} heads"
            raise UserError(f"the U-Net has an attention of {width} channels, which cannot be cut into {cut}")
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(part, heads) for part in _numbered(shapes, "transformer_blocks")
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

    def __init__(self, shapes: Shapes, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(_below(shapes, "attn1"), heads)
        self.attn2 = Attention(_below(shapes, "attn2"), heads)
        self.ff = FeedForward(_below(shapes, "ff"))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(shapes[f"norm{i}.weight"]) for i in (1, 2, 3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (b, pixels, c), context (b, n, d) -> (b, pixels, c)"""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return x


class Attention(nn.Module):
    """Queries from x, keys and values from the context."""

    def __init__(self, shapes: Shapes, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (linear(shapes, name) for name in ("to_q", "to_k", "to_v"))
        self.to_out = nn.Sequential(linear(shapes, "to_out.0"))

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

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        # The second place was a dropout of 0.
        self.net = nn.Sequential(GatedGelu(_below(shapes, "net.0")), nn.Identity(), linear(shapes, "net.2"))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, c)"""
        y: Tensor = self.net(x)
        return y


class GatedGelu(nn.Module):
    """x -> a * gelu(b), where a and b are the halves of one projection."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.proj = linear(shapes, "proj")

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, 4c)"""
        a, b = self.proj(x).chunk(2, -1)
        y: Tensor = a * F.gelu(b)
        return y


class Downsample(nn.Module):
    """Half the size, rounded up."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.op = _conv(shapes, "op", stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h / 2, w / 2)"""
        y: Tensor = self.op(x)
        return y


class Upsample(nn.Module):
    """Nearest pixels, then a convolution."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.conv = _conv(shapes, "conv")

    def forward(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        """(b, c, h, w) -> (b, c, *size)"""
        y: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return y


def embedder(shapes: Shapes, name: str) -> nn.Sequential:
    """A two-layer net, whose layers are called 0 and 2: (b, n) -> (b, e)."""
    return nn.Sequential(linear(shapes, f"{name}.0"), nn.SiLU(), linear(shapes, f"{name}.2"))


def _part(shapes: Shapes) -> nn.Module:
    """The part that has tensors of these names."""
    if "in_layers.0.weight" in shapes:
        return ResBlock(shapes)
    if "proj_in.weight" in shapes:
        return Transformer(shapes)
    if "op.weight" in shapes:
        return Downsample(shapes)
    if "conv.weight" in shapes:
        return Upsample(shapes)
    out, into, kernel, _ = shapes["weight"]
    return nn.Conv2d(into, out, kernel, padding=kernel // 2)


def _below(shapes: Shapes, name: str) -> Shapes:
    """The tensors of the part `name`, by their names within it."""
    return {k[len(name) + 1 :]: v for k, v in shapes.items() if k.startswith(f"{name}.")}


def _numbered(shapes: Shapes, name: str = "") -> list[Shapes]:
    """The tensors of the parts `name.0`, `name.1` ..., as long as the numbers go on."""
    part = _below(shapes, name) if name else shapes
    numbers = {int(m[1]) for k in part if (m := re.match(r"(\d+)\.", k))}
    gap = next((i for i in range(len(numbers)) if i not in numbers), None)
    if gap is not None:
        raise KeyError(f"{name}.{gap}")
    return [_below(part, str(i)) for i in range(len(numbers))]


def _pixels(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h * w, c)"""
    return x.flatten(2).transpose(1, 2)


def _image(x: Tensor, like: Tensor) -> Tensor:
    """(b, h * w, c) -> (b, c, h, w)"""
    return x.transpose(1, 2).reshape(*x.shape[:1], -1, *like.shape[-2:])


def _conv(shapes: Shapes, name: str, stride: int = 1) -> nn.Conv2d:
    out, into, kernel, _ = shapes[f"{name}.weight"]
    return nn.Conv2d(into, out, kernel, stride=stride, padding=kernel // 2)


def _norm(shapes: Shapes, name: str, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(32, shapes[f"{name}.weight"][0], eps=eps)
