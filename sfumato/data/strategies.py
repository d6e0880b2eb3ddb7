"""The four strategies of a family: how captions become tokens and cond, and how latents and cond are cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sfumato.data.batch import Cond, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How much of a caption a text encoder takes."""

    encoder: str
    """Its name in messages: "CLIP"."""
    tokens: int
    """The most tokens, without the marks of start and end."""
    count: Callable[[Sequence[str]], Sequence[int]]
    """Captions -> how many tokens each has, uncut."""
    raised_by: str = ""
    """The setting that makes it take more, if there is one."""


class TokenizeStrategy(Protocol):
    """Captions -> tokens."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the result depends on besides the caption."""
        ...

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """b captions -> named tensors whose first dimension is b."""
        ...

    def limits(self) -> Sequence[Limit]:
        """Where captions are cut: one for each encoder that reads them in its own way."""
        ...


class TextEncodingStrategy(Protocol):
    """Tokens -> cond."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the result depends on besides tokens and weights of the encoders."""
        ...

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """Tokens of b captions -> named tensors whose first dimension is b. Differentiable."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KohyaLatents:
    """How sd-scripts keeps a family's latents beside the images, in fp32."""

    suffixes: tuple[str, ...]
    """Endings of its files, behind the image's size: "_sdxl.npz"."""
    plain: bool = False
    """Whether old files have no size in their name, and no ending but ".npz"."""
    scaled: bool = False
    """Whether they are the denoiser's latents, and not raw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KohyaOutputs:
    """How sd-scripts keeps a family's text outputs beside the images, in fp32."""

    suffix: str
    """Ending of its files: "_flux_te.npz"."""
    read: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor] | None]
    """(arrays of a file, an entry of ours for some caption) -> its entry, in any number format; None for files that
    were made with other settings. Errors: `KeyError`, `IndexError` and `RuntimeError` for arrays that do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsCachingStrategy:
    """A family's latents; caching them is the same for all."""

    stride: int = 8
    """Image pixels per latent pixel, on a side."""
    channels: int = 4
    dtype: torch.dtype = torch.float16
    """What latents are cached in."""
    patch: int = 1
    """Latent pixels a side that the denoiser takes together: sides of images are multiples of stride x patch."""
    frames: bool = False
    """Whether the VAE is one of videos (b, c, frames, h, w); a picture passes through it as a video of one frame."""
    kohya: KohyaLatents | None = None

    @property
    def multiple(self) -> int:
        """What the sides of images are multiples of, in pixels."""
        return self.stride * self.patch

    def encode(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """(b, 3, H, W) in [-1, 1] -> (b, c, h, w): the posterior's mean, raw."""
        mean: Tensor = cast(Any, vae).encode(pixels[:, :, None] if self.frames else pixels).latent_dist.mode()
        return mean[:, :, 0] if self.frames else mean

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """The inverse of `encode`, but for what is lost: raw (b, c, h, w) -> (b, 3, H, W)."""
        pixels: Tensor = cast(Any, vae).decode(latents[:, :, None] if self.frames else latents).sample
        return pixels[:, :, 0] if self.frames else pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderOutputsCachingStrategy:
    """A family's text outputs, and how they are cached."""

    fields: tuple[str, ...]
    """Names in cond that are cached."""
    ragged: Mapping[str, str] = field(default_factory=dict)
    """Field (n, ...) -> the field (n,), true for its used rows, which come first: such a field is cached without the
    others, of which there may be none left. In a cond of any length the second field may be missing, which means that
    all rows are used: attention is faster without a mask."""
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Ragged field -> rows that it is padded to with zeros when it is read, if the batch has no longer one; those
    without are padded to the longest of a batch."""
    dtype: torch.dtype = torch.float16
    settings: Mapping[str, object] = field(default_factory=dict)
    kohya: KohyaOutputs | None = None

    def entry(self, cond: Cond, i: int) -> dict[str, Tensor]:
        """What is cached of the i-th caption of a cond."""
        used = {name: int(cond[mask][i].sum()) for name, mask in self.ragged.items() if mask in cond}
        stored = [name for name in self.fields if name not in self.ragged.values()]
        return {name: cond[name][i][: used.get(name)] for name in stored}

    def join(self, entries: Sequence[Mapping[str, Tensor]]) -> Cond:
        """The cond of a batch from the entries of its captions."""
        joined = {}
        for name in entries[0]:
            values = [entry[name] for entry in entries]
            if name not in self.ragged:
                joined[name] = torch.stack(values)
                continue
            used = torch.tensor([len(value) for value in values])
            least = self.lengths.get(name)
            rows = max(int(used.max()), least or 0)
            joined[name] = torch.stack([_padded(value, rows) for value in values])
            if least is not None or int(used.min()) < rows:
                joined[self.ragged[name]] = torch.arange(rows) < used[:, None]
        return joined


def _padded(value: Tensor, rows: int) -> Tensor:
    """(n, ...) -> (rows, ...), zeros behind."""
    return torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])
