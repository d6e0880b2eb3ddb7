"""What a family says of itself. Everything else is written once and applied to it from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.config import NoiseConfig
from sfumato.data.batch import Batch, Cond
from sfumato.data.strategies import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)
from sfumato.errors import UserError
from sfumato.formats.dialect import Dialect
from sfumato.tensors.noise import Process


@dataclass(slots=True)
class Models:
    """A loaded checkpoint. Nets are in eval mode and frozen; trainables thaw what they train."""

    family: Family
    options: Any
    """The family's `facts.Options`, completed by what the file says (v prediction, for example)."""
    denoiser: nn.Module
    encoders: dict[str, nn.Module]
    """By name: {"clip_l": ...}; module paths are the names that files use."""
    tokenizers: dict[str, Any]
    vae: nn.Module | None
    source: Path | None = None
    """The file or folder that it came from."""
    layout: str = "single_file"
    """"single_file" or "diffusers": how the source was laid out, and how a whole model is saved by default."""
    extras: dict[str, Any] = field(default_factory=dict)
    """What a family must remember for saving."""

    def the_vae(self) -> nn.Module:
        """The VAE. Errors: `UserError` when the checkpoint came without one and none was given."""
        if self.vae is None:
            raise UserError(f"{self.source} has no VAE, which pictures must pass through; give one with --vae")
        return self.vae

    def nets(self) -> dict[str, nn.Module]:
        """What can be trained, by component name: the denoiser and the encoders."""
        return {"denoiser": self.denoiser, **self.encoders}


class Load(Protocol):
    def __call__(
        self,
        path: str,
        options: Any,
        *,
        vae: str | None = None,
        tokenizer: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Models:
        """Read a checkpoint (file, folder or hub id). `dtype`: of denoiser and encoders; None: as in the file."""
        ...


class Save(Protocol):
    def __call__(
        self,
        models: Models,
        path: Path,
        *,
        layout: str,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Write a whole model. `state`: {component: native tensors} to write in place of the nets' own (an average, say)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family is a record of facts and a few short functions."""

    name: str
    load: Load
    save: Save
    tokenize: Callable[[Models], TokenizeStrategy]
    encode: Callable[[Models], TextEncodingStrategy]
    latents: LatentsCachingStrategy
    outputs: TextEncoderOutputsCachingStrategy
    process: Callable[[Models, NoiseConfig, Any], Process]
    """(models, noise config, loss config) -> how latents are noised, what the net should say, and what an error weighs."""
    predict: Callable[[nn.Module, Tensor, Tensor, Cond, Batch | None], Tensor]
    """(denoiser, x (b, c, h, w), t (b,), cond, batch) -> what the denoiser says, shaped as x. `batch` is None when sampling."""
    scale: Callable[[nn.Module, Tensor], Tensor]
    """(vae, raw latents) -> the latents that the denoiser takes: shifted and scaled."""
    unscale: Callable[[nn.Module, Tensor], Tensor]
    """The inverse of `scale`."""
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    """The denoiser's repeated blocks, in forward order: what checkpointing, swapping and compiling act on."""
    encoder_blocks: Callable[[nn.Module], Sequence[nn.Module]]
    """The same for a text encoder."""
    dialects: Callable[[Models], Mapping[str, Dialect]]
    """Adapter key names: "kohya", "comfy", "peft"."""
    targets: Mapping[str, Mapping[str, tuple[str, ...]]]
    """component -> layer kind ("linear", "conv") -> path patterns (fnmatch) of the layers that adapters go on."""
    encoder_lr_order: tuple[str, ...] = ()
    """Encoders in the order of kohya's text_encoder_lr values."""
