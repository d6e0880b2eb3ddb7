"""What a family says of its ControlNet-LLLites (kohya-ss 2023): small nets at a denoiser's layers that change what
these are given, by an image that is to be followed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from sfumato.config import FamilyOptions
from sfumato.models.detection import Shapes
from sfumato.models.layers import Denoiser

Drop = Callable[[Tensor], Tensor]
"""A dropout."""


class Part(Protocol):
    """What stands at a layer."""

    width: int
    """Numbers that the layer is given."""

    def __call__(self, x: Tensor, hint: Tensor, drop: Drop) -> Tensor:
        """What the layer is given (b, n, c) -> what is added to it."""
        ...


class LiteNet(Denoiser):
    """All small nets of a file; its tensors are called as there."""

    def parts(self, prefix: str) -> dict[str, nn.Module]:
        """Those at layers, by their names without the `prefix`."""
        return {name.removeprefix(prefix): part for name, part in self.named_children() if name.startswith(prefix)}

    @property
    def dim(self) -> int:
        """Width of the nets."""
        up = next(t for name, t in self.state_dict().items() if name.endswith((".up.weight", ".up.0.weight")))
        return int(up.shape[1])

    def hint(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] -> what all parts make of them."""
        return images


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteSpec:
    """How these nets are made for a family's denoiser, and kept in files."""

    prefix: str
    """In files before the path of a layer, whose dots are underscores there."""
    net: Callable[[Shapes], LiteNet]
    """The net, on the meta device, for a file's tensors."""
    shapes: Callable[[Shapes, FamilyOptions, int, int], Shapes]
    """(the denoiser's tensors, options, cond_emb_dim, network_dim) -> the tensors of a new net."""
    zero: str
    """Pattern of whole names: tensors that are zeros in a new net."""
    one: str = r"(?!)"
    """The same of ones. All others are random."""
    metadata: Callable[[Shapes], Mapping[str, str]] = lambda shapes: {}
    """A net's tensors -> what its file says of them besides."""
    check: Callable[[Shapes, Mapping[str, str]], None] = lambda shapes, metadata: None
    """(a file's tensors, its metadata). Errors: `UserError` for what is another kind of net."""
