"""What a family says of nets by which its denoiser follows images: ControlNets (arXiv:2302.05543).

A control net is made of the denoiser's own first blocks. It takes what the denoiser takes and an image besides, and
what it gives is added to what passes between the denoiser's blocks. The last layers that it goes through are zeros at
first, so that a new control net changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from sfumato.config import FamilyOptions
from sfumato.models.components import Component, Config
from sfumato.models.detection import Shapes

FLAG = "controlnet_model_name_or_path"
"""The setting that names a control net's file or folder."""
Residuals = Sequence[Tensor]
"""What a control net gives, in an order of its own: each at the scale at which it is added."""


class Follower(Protocol):
    """Something on a denoiser that makes it follow images."""

    strength: float
    """0: the denoiser is bit for bit what it is alone."""
    net: nn.Module
    """What it consists of, besides the denoiser."""
    takes_latents: bool
    """Whether the VAE encodes what it follows."""
    blocks: Sequence[nn.Module]
    """Its repeated blocks, which run before the denoiser's: what checkpointing and compiling act on."""

    def follow(self, images: Tensor | None) -> None:
        """The images (b, 3, H, W) in [0, 1] of the samples to come, or of every b-th of them; None: it does nothing."""
        ...

    def remove(self) -> None:
        """The denoiser is again as it was."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where one of the residuals goes into the denoiser."""

    module: nn.Module
    """Of the denoiser."""
    residual: int
    """Its place among those that the control net gives."""
    add: Callable[[Any, Tensor], Any]
    """(what the module gives, or the tuple of what it is given, residual) -> the same with the residual added."""
    before: bool = False
    """Whether it is added to what the module is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSpec:
    """How control nets of a family's denoiser are made, kept in files and put onto it."""

    component: Component
    """The net for tensors of given shapes, and its names in files; the denoiser's names for what both have. The net's
    forward takes the denoiser's arguments, and `hint` by name; it gives `Residuals`. A new file has the first of
    `prefixes` before its names, which are those of `single`."""
    shapes: Callable[[Shapes, FamilyOptions], Shapes]
    """(the denoiser's tensors, options) -> those of a new control net. Errors: `UserError` for options that do not go
    with the denoiser."""
    zero: Callable[[Shapes], str]
    """The tensors of a new net -> pattern of whole names: those that are zeros. Others have the values of the
    denoiser's of that name, or random ones if it has none."""
    doors: Callable[[nn.Module, nn.Module], Sequence[Door]]
    """(denoiser, control net) -> where its residuals go. Errors: `UserError` if they do not fit."""
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    """The control net's repeated blocks, in forward order: what checkpointing and compiling act on."""
    arguments: Callable[[nn.Module, Sequence[Any]], Sequence[Any]] = lambda denoiser, args: args
    """(denoiser, its arguments) -> those of the net's forward."""
    unused: Callable[[nn.Module], str] = lambda net: r"(?!)"
    """Pattern of whole names: tensors of this control net that its residuals do not depend on, which are not
    trained."""
    takes_latents: Callable[[nn.Module], bool] = lambda net: False
    """Whether this control net's `hint` are the images' latents, as the denoiser takes them, and not their pixels
    (b, 3, H, W) in [0, 1]."""
    config: Callable[[Shapes], Config]
    """Native shapes of a control net -> its config.json in a diffusers folder."""
