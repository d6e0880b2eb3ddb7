"""ControlNet-LLLite of Stable Diffusion XL, in kohya's names: each part looks at the image by itself.

Where it stands, and its sizes, are those of sd-scripts' networks/control_net_lllite_for_train.py.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.config import FamilyOptions
from sfumato.models.detection import Shapes
from sfumato.models.lllite import Drop, LiteNet, LiteSpec

PREFIX = "lllite_unet_"
LAYER = re.compile(
    r"((?P<down>input_blocks)\.(?P<block>\d+)|middle_block)\..*transformer_blocks\.\d+\.(attn1\.to_[qkv]|attn2\.to_q)"
    r"\.weight"
)
"""On the way down and in the middle, what attends to the image: keys and values of the text have no place in it."""
_COARSER = r"input_blocks\.(\d+)\.0\.op\.weight"
LOOKS = 5
"""Layers that an image goes through at most, activations among them."""
SHIFT = 3
"""Latents are 2^3 times smaller than images."""


class Lite(LiteNet):
    """`x + up(mid([conditioning1(image), down(x)]))` at each layer."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        for name in dict.fromkeys(key.partition(".")[0] for key in shapes if key.startswith(PREFIX)):
            self.add_module(name, LitePart(shapes, name))


class LitePart(nn.Module):
    """What stands at one layer."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.conditioning1, emb_dim = nn.Sequential(), 3
        for i in range(0, LOOKS, 2):
            if (weight := shapes.get(f"{name}.conditioning1.{i}.weight")) is not None:
                if i:
                    self.conditioning1.append(nn.ReLU())
                self.conditioning1.append(nn.Conv2d(emb_dim, weight[0], weight[-1], stride=weight[-1]))
                emb_dim = weight[0]
        dim, self.width = shapes[f"{name}.down.0.weight"]
        self.down = nn.Sequential(nn.Linear(self.width, dim), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(dim + emb_dim, dim), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(dim, self.width))

    def forward(self, x: Tensor, hint: Tensor, drop: Drop) -> Tensor:
        """x (b, h * w, c), image (b, 3, H, W) -> (b, h * w, c)"""
        stride = 1
        for layer in self.conditioning1:
            stride *= layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
        # Sides are rounded up on the way down, as the U-Net's are.
        edges = (0, -hint.shape[3] % stride, 0, -hint.shape[2] % stride)
        seen = self.conditioning1(F.pad(hint, edges, "replicate")).flatten(2).transpose(1, 2)
        y: Tensor = self.up(drop(self.mid(torch.cat([seen, self.down(x)], -1))))
        return y


def sizes(denoiser: Shapes, options: FamilyOptions, emb_dim: int, dim: int) -> Shapes:
    """A new net's tensors."""
    coarser = [int(found[1]) for name in denoiser if (found := re.fullmatch(_COARSER, name))]
    made: dict[str, tuple[int, ...]] = {}
    for name, shape in denoiser.items():
        if found := LAYER.fullmatch(name):
            halved = sum(block < int(found["block"]) for block in coarser) if found["down"] else len(coarser)
            # A token is 2^halved latents wide: the image is brought to that in steps of 4, and one of 2.
            sides = [4] * ((SHIFT + halved) // 2) + [2] * ((SHIFT + halved) % 2)
            path = PREFIX + name.removesuffix(".weight").replace(".", "_")
            made |= {f"{path}.{tensor}": size for tensor, size in _part(shape[1], emb_dim, dim, sides).items()}
    return made


def _part(width: int, emb_dim: int, dim: int, sides: list[int]) -> dict[str, tuple[int, ...]]:
    channels = [3, *[emb_dim // 2] * (len(sides) - 1), emb_dim]
    layers: dict[str, tuple[int, ...]] = {
        f"conditioning1.{2 * i}": (channels[i + 1], channels[i], side, side) for i, side in enumerate(sides)
    }
    layers |= {"down.0": (dim, width), "mid.0": (dim, dim + emb_dim), "up.0": (width, dim)}
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


LLLITE = LiteSpec(prefix=PREFIX, net=Lite.of, shapes=sizes, zero=r".*\.up\.0\.(weight|bias)")
