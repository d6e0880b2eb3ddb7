"""Weights in fp8 with a scale each, as ComfyUI writes them, and weights that stand in codes written again in theirs
(`coded` reads them)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from sfumato.formats.coded import SCALES, Coded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sfumato.formats.planned import PlannedTensor, Writable

SCALE = SCALES[0]


def quantised(tensors: Mapping[str, Writable], names: Collection[str], marks: Iterable[str]) -> dict[str, Writable]:
    """The tensors of a file, those of these names in fp8 with a scale that uses the whole range; `marks`: the names of
    the marks, such as `scaled_fp8` after the prefix of a net."""
    import torch

    from sfumato.formats.planned import PlannedTensor, as_planned

    out = {**tensors}
    for name in names:
        weight = as_planned(tensors[name])
        out[name] = weight.then(_narrowed, torch.float8_e4m3fn)
        out[name.removesuffix("weight") + SCALE] = PlannedTensor(torch.float32, (), partial(_scale, weight))
    # Two numbers: the reader is not to multiply in fp8, for which activations would be rounded as well.
    return out | {name: torch.zeros(2, dtype=torch.float8_e4m3fn) for name in marks}


def _scale(weight: PlannedTensor) -> Tensor:
    return scale_of(weight.make())


def scale_of(weight: Tensor) -> Tensor:
    """() fp32: what a weight is divided by to use the range of e4m3."""
    import torch

    most = torch.finfo(torch.float8_e4m3fn).max
    return (weight.detach().float().abs().amax() / most).clamp(min=torch.finfo(torch.float32).tiny)


def _narrowed(weight: Tensor) -> Tensor:
    import torch

    return (weight.float() / scale_of(weight)).to(torch.float8_e4m3fn)


def recoded(
    weight: PlannedTensor, of: Coded, dtype: torch.dtype, scale: PlannedTensor
) -> tuple[PlannedTensor, PlannedTensor]:
    """A weight in fp32 in the codes of `of`, which are `dtype`, and its scale: `scale`, but where its numbers would not
    fit."""
    import torch

    from sfumato.formats.planned import PlannedTensor
    from sfumato.tensors.stored import turned

    scales = math.prod(scale.shape)
    most = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max

    def plain(w: Tensor) -> Tensor:
        """(rows, parts of a row, numbers of a part); with one scale for all (1, 1, numbers)."""
        w = turned(w, of.group)
        return w.reshape(1, 1, -1) if scales == 1 else w.reshape(len(w), scales // len(w), -1)

    def fitting(parts: Tensor) -> Tensor:
        """(rows, parts, 1)"""
        old = scale.make().float().reshape(*parts.shape[:2], 1)
        largest = parts.abs().amax(-1, keepdim=True)
        # Turned and turned back, the largest number is not quite what it was.
        return torch.where(largest > most * old * (1 + 1e-5), largest / most, old).to(scale.dtype)

    def narrowed(w: Tensor) -> Tensor:
        parts = plain(w)
        codes = (parts / fitting(parts).float()).clamp(-most, most)
        return (codes if dtype.is_floating_point else codes.round()).to(dtype).view(w.shape)

    made = PlannedTensor(scale.dtype, scale.shape, lambda: fitting(plain(weight.make())).view(scale.shape))
    return weight.then(narrowed, dtype), made
