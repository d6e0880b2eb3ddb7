"""Weights in fp8 with a scale each, as ComfyUI writes them: which tensor scales which weight, reading and writing.

`X.weight` in fp8 goes with `X.scale_weight` (or `X.weight_scale`), by which it is multiplied; `scaled_fp8` marks the
file, and `X.scale_input` and the like are for kernels that multiply in fp8 (comfy/ops.py and QUANTIZATION.md there).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from sfumato.formats.header import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sfumato.formats.planned import PlannedTensor, Writable

STORED = ("F8_E4M3", "F8_E5M2")
"""Formats that nothing is computed in; bf16 holds their values exactly."""
MARK = "scaled_fp8"
SCALE = "scale_weight"
_SCALES = (SCALE, "weight_scale")
_COMPANIONS = (*_SCALES, "scale_input", "input_scale", "comfy_quant")


def scales(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Weight in fp8 -> its scale: one number for all of it, or one for each row."""
    found = {}
    for name, info in tensors.items():
        if info.dtype in STORED and info.shape and name.endswith(".weight"):
            path = name.removesuffix("weight")
            scale = next((path + each for each in _SCALES if path + each in tensors), None)
            if scale and math.prod(tensors[scale].shape) in (1, info.shape[0]):
                found[name] = scale
    return found


def companions(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Tensors that are no weights, but belong to weights in fp8 that have a scale."""
    scaled = scales(tensors)
    each = {name.removesuffix("weight") + each for name in scaled for each in _COMPANIONS}
    marks = {name for name in tensors if name.split(".")[-1] == MARK} if scaled else set()
    return {name for name in tensors if name in each} | marks


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


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in fp8 times its scale, or times those of its rows."""
    return (weight.float() * _by_row(scale, weight)).to(dtype)


def exact(stored: PlannedTensor, scale: PlannedTensor) -> PlannedTensor:
    """A weight in fp8 in fp32."""
    import torch

    return stored.then(lambda t: widened(t, scale.make(), torch.float32), torch.float32)


def rescaled(weight: PlannedTensor, dtype: torch.dtype, scale: PlannedTensor) -> tuple[PlannedTensor, PlannedTensor]:
    """A weight in fp32 as it stands in fp8, and its scale: `scale`, but where its numbers would not fit."""
    import torch

    from sfumato.formats.planned import PlannedTensor

    most = torch.finfo(dtype).max

    def fitting(w: Tensor) -> Tensor:
        old = scale.make().float()
        largest = (w.reshape(len(w), -1) if old.numel() > 1 else w.reshape(1, -1)).abs().amax(1).view(old.shape)
        return torch.where(largest > most * old, largest / most, old).to(scale.dtype)

    def narrowed(w: Tensor) -> Tensor:
        return (w / _by_row(fitting(w), w)).clamp(-most, most).to(dtype)

    return weight.then(narrowed, dtype), PlannedTensor(scale.dtype, scale.shape, lambda: fitting(weight.make()))


def _by_row(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.float().reshape(-1, *[1] * (weight.ndim - 1))
