"""ControlNet-LLLite of Anima, in kohya's names: one net looks at the image for all parts.

The second version of sd-scripts' networks/control_net_lllite_anima.py, which ComfyUI has as comfy/ldm/anima/lllite.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.config import FamilyOptions
from sfumato.errors import UserError
from sfumato.families.anima.facts import LITE_LAYERS, Options, lite_layers
from sfumato.models.detection import Shapes, has
from sfumato.models.layers import numbered
from sfumato.models.lllite import Drop, LiteNet, LiteSpec

PREFIX, EYE = "lllite_dit_", "lllite_conditioning1"
VERSION = "2"
DILATIONS = (1, 2, 4, 8)
"""Steps between the pixels that the branches of `Pyramid` look at."""


class Lite(LiteNet):
    """`x + up(silu(film(mid([image, silu(down(x))]))))` at each layer, where the image is what `Eye` makes of it."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.add_module(EYE, Eye(shapes, EYE))
        for name in dict.fromkeys(key.partition(".")[0] for key in shapes if key.startswith(PREFIX)):
            self.add_module(name, LitePart(shapes, name))

    def hint(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, H / 16 * W / 16, emb)"""
        seen: Tensor = self.get_submodule(EYE)(images)
        return seen


class Eye(nn.Module):
    """The image -> a row of numbers for each of the transformer's tokens, which are 16 pixels wide."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        for i, stride in enumerate((4, 1, 4), 1):
            self.add_module(f"conv{i}", conv := _conv(shapes, f"{name}.conv{i}", stride))
            self.add_module(f"norm{i}", _norm(conv.out_channels))
        self.resblocks = nn.ModuleList(ResBlock(shapes, block) for block in numbered(shapes, f"{name}.resblocks"))
        self.aspp = Pyramid(shapes, f"{name}.aspp") if f"{name}.aspp.proj.0.weight" in shapes else None
        self.proj = _conv(shapes, f"{name}.proj")
        self.out_norm = nn.LayerNorm(self.proj.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, H / 16 * W / 16, emb)"""
        for i in (1, 2, 3):
            x = F.silu(self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(x)))
        for block in self.resblocks:
            x = block(x)
        if self.aspp is not None:
            x = self.aspp(x)
        rows: Tensor = self.out_norm(self.proj(x).flatten(2).transpose(1, 2))
        return rows


class ResBlock(nn.Module):
    """Two convolutions beside a skip."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = (_conv(shapes, f"{name}.conv{i}") for i in (1, 2))
        self.norm1, self.norm2 = (_norm(conv.in_channels) for conv in (self.conv1, self.conv2))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)"""
        y: Tensor = x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y


class Pyramid(nn.Module):
    """The surroundings of each pixel, near and far, and the mean of all (ASPP, arXiv:1706.05587)."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            _seen(shapes, branch, dilation)
            for branch, dilation in zip(numbered(shapes, f"{name}.branches"), DILATIONS, strict=True)
        )
        self.global_conv = _seen(shapes, f"{name}.global_conv")
        self.proj = _seen(shapes, f"{name}.proj")

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)"""
        mean = self.global_conv(x.mean((2, 3), keepdim=True)).expand_as(x)
        y: Tensor = self.proj(torch.cat([*(branch(x) for branch in self.branches), mean], 1))
        return y


class LitePart(nn.Module):
    """What stands at one layer."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        (dim, self.width), emb_dim = shapes[f"{name}.down.weight"], shapes[f"{EYE}.proj.weight"][0]
        self.down, self.mid = nn.Linear(self.width, dim), nn.Linear(dim + emb_dim, dim)
        self.cond_to_film, self.up = nn.Linear(emb_dim, 2 * dim), nn.Linear(dim, self.width)
        self.depth_embed = nn.Parameter(torch.empty(emb_dim))

    def forward(self, x: Tensor, hint: Tensor, drop: Drop) -> Tensor:
        """x (b, n, c), hint (b, n, emb) -> (b, n, c)"""
        seen = hint + self.depth_embed.to(hint.dtype)
        scale, shift = self.cond_to_film(seen).chunk(2, -1)
        inner = self.mid(torch.cat([seen, F.silu(self.down(x))], -1))
        y: Tensor = self.up(drop(F.silu(inner * (1 + scale) + shift)))
        return y


def sizes(denoiser: Shapes, options: FamilyOptions, emb_dim: int, dim: int) -> Shapes:
    """A new net's tensors."""
    o = Options.of(options)
    layers = "|".join(LITE_LAYERS[name] for name in lite_layers(o.lllite_target_layers))
    made = {f"{EYE}.{name}": size for name, size in _eye(o.lllite_cond_dim, emb_dim, o).items()}
    for name, shape in denoiser.items():
        if re.fullmatch(rf"blocks\.\d+\.({layers})\.weight", name):
            path, width = PREFIX + name.removesuffix(".weight").replace(".", "_"), shape[1]
            rows = {"down": (dim, width), "mid": (dim, dim + emb_dim), "cond_to_film": (2 * dim, emb_dim)}
            part = _with_biases({**rows, "up": (width, dim)}) | {"depth_embed": (emb_dim,)}
            made |= {f"{path}.{tensor}": size for tensor, size in part.items()}
    return made


def _eye(width: int, emb_dim: int, o: Options) -> dict[str, tuple[int, ...]]:
    half = width // 2
    layers: dict[str, tuple[int, ...]] = {
        "conv1": (half, 3, 4, 4),
        "conv2": (half, half, 3, 3),
        "conv3": (width, half, 4, 4),
        "proj": (emb_dim, width, 1, 1),
        "out_norm": (emb_dim,),
        **{f"norm{i}": (size,) for i, size in ((1, half), (2, half), (3, width))},
    }
    for block in range(o.lllite_cond_resblocks):
        for i in (1, 2):
            layers[f"resblocks.{block}.conv{i}"] = (width, width, 3, 3)
            layers[f"resblocks.{block}.norm{i}"] = (width,)
    if o.lllite_use_aspp:
        seen = {f"branches.{i}": side for i, side in enumerate(1 if d == 1 else 3 for d in DILATIONS)}
        for name, side in {**seen, "global_conv": 1, "proj": 1}.items():
            into = (len(DILATIONS) + 1) * width if name == "proj" else width
            layers |= {f"aspp.{name}.0": (width, into, side, side), f"aspp.{name}.1": (width,)}
    return _with_biases(layers)


def _with_biases(layers: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def metadata(shapes: Shapes) -> dict[str, str]:
    """What loaders build the net by."""
    layers = ",".join(name for name, path in LITE_LAYERS.items() if _has(shapes, path.replace(r"\.", "_")))
    dim = next(shape[0] for name, shape in shapes.items() if name.endswith(".down.weight"))
    aspp = f"{EYE}.aspp.proj.0.weight" in shapes
    values = {
        "version": VERSION,
        "cond_emb_dim": shapes[f"{EYE}.proj.weight"][0],
        "mlp_dim": dim,
        "target_layers": layers,
        "target_atomics": layers,
        "cond_dim": shapes[f"{EYE}.conv3.weight"][0],
        "cond_resblocks": len(numbered(shapes, f"{EYE}.resblocks")),
        "use_aspp": str(aspp).lower(),
        **({"aspp_dilations": ",".join(map(str, DILATIONS))} if aspp else {}),
        "cond_in_channels": 3,
        "inpaint_masked_input": "false",
    }
    return {f"lllite.{name}": str(value) for name, value in values.items()}


def _has(shapes: Shapes, layer: str) -> bool:
    return has(shapes, rf"{PREFIX}blocks_\d+_({layer})\.up\.bias")


def check(shapes: Shapes, found: Mapping[str, str]) -> None:
    """Errors: `UserError` for later versions of these nets, and those for inpainting."""
    channels = shapes.get(f"{EYE}.conv1.weight", (0, 0))[1]
    version = found.get("lllite.version", VERSION)
    dilations = found.get("lllite.aspp_dilations", ",".join(map(str, DILATIONS)))
    if channels != 3 or version != VERSION:
        kind = f"version {version}, whose image has {channels} channels" if channels else f"version {version}"
        raise UserError(f"it is a ControlNet-LLLite of {kind}; that of {VERSION} with 3 is supported (RGB images)")
    if dilations != ",".join(map(str, DILATIONS)):
        raise UserError(f"its lllite.aspp_dilations are {dilations}; {DILATIONS} are supported")


def _conv(shapes: Shapes, name: str, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    out, into, side, _ = shapes[f"{name}.weight"]
    padding = dilation * (side // 2) if stride == 1 else 0
    return nn.Conv2d(into, out, side, stride=stride, padding=padding, dilation=dilation)


def _norm(channels: int) -> nn.GroupNorm:
    """In 8 groups, or as many as a power of two allows."""
    return nn.GroupNorm(next(n for n in (8, 4, 2, 1) if channels % n == 0), channels)


def _seen(shapes: Shapes, name: str, dilation: int = 1) -> nn.Sequential:
    conv = _conv(shapes, f"{name}.0", dilation=dilation)
    return nn.Sequential(conv, _norm(conv.out_channels), nn.SiLU())


LLLITE = LiteSpec(
    prefix=PREFIX,
    net=Lite.of,
    shapes=sizes,
    zero=r".*\.((up|cond_to_film)\.(weight|bias)|depth_embed)|.*norm\d?\.bias|.*\.aspp\..*\.1\.bias",
    one=r".*norm\d?\.weight|.*\.aspp\..*\.1\.weight",
    metadata=metadata,
    check=check,
)
