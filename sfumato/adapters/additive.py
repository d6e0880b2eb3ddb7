"""Kinds whose change of a layer's output follows from its input and is added, and what they share: the scale that a
rank stabilises, and DoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sfumato.adapters.base import Adapter, LayerOptions
from sfumato.errors import UserError
from sfumato.formats.dialect import DORA, AdapterTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditiveOptions(LayerOptions):
    rs_lora: bool = False
    """The change is scaled by alpha / sqrt(rank) (arXiv:2312.03732). A file's alpha says the same for every reader:
    divided by the rank, it is that scale."""
    dora_wd: bool = False
    """DoRA (arXiv:2402.09353): the magnitude and the direction of the layer's weight are trained apart."""
    wd_on_out: bool = True
    """A magnitude for each output row of the weight; False: for each input column, as in files of early 2024."""


class Additive(Adapter):
    """A kind whose change of the output follows from the input, and is added.

    With DoRA the weight is `dora_scale / norm(W + dW) * (W + dW)`, in LyCORIS' names and shapes: (out, 1, ...) or
    (1, in, ...). The norm counts as a constant in the backward pass (the paper's section 4.3, and PEFT; not LyCORIS).
    """

    Options: ClassVar[type[LayerOptions]] = AdditiveOptions
    dora_scale: nn.Parameter | None

    def __init__(self, base: nn.Module, options: LayerOptions, generator: torch.Generator) -> None:
        if isinstance(options, AdditiveOptions) and options.rs_lora:
            options = replace(options, alpha=(options.alpha or options.rank) * math.sqrt(options.rank))
        super().__init__(base, options, generator)
        self.register_parameter("dora_scale", None)
        if isinstance(options, AdditiveOptions) and options.dora_wd:
            self.dora_scale = nn.Parameter(_magnitudes(base, options.wd_on_out))

    def needs_weight(self) -> bool:
        return self.dora_scale is not None

    def delta(self, x: Tensor) -> Tensor:
        """The layer's input -> the change of its output, before `options.scale`."""
        raise NotImplementedError

    def norm(self) -> Tensor:
        """Frobenius norm of dW, 0-d."""
        raise NotImplementedError

    @property
    def factors(self) -> int:
        """How many factors dW has that are trained, of which each takes an equal share of a scale."""
        return len(list(self.parameters()))

    def product(self, weight: Tensor) -> Tensor:
        """dW: what the factors make, times `options.scale`, shaped as the layer's `weight`, fp32."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        if self.dora_scale is None:
            return self.add(y, self.delta(x), self.options.scale)
        return self.add(y, self._turned(x, y, layer, self.dora_scale))

    def _turned(self, x: Tensor, y: Tensor, layer: nn.Module, magnitude: Tensor) -> Tensor:
        """The change of the output with DoRA."""
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        ones = [1] * (weight.ndim - 2)  # after the channels of x and y
        growth = (self._gain(weight, magnitude) - 1).view(-1, *ones)
        shift = bias.to(y.dtype).view(-1, *ones) if isinstance(bias, Tensor) else 0.0
        if _on_out(magnitude):
            delta = self.delta(x) * self.options.scale
            return delta + (y - shift + delta) * growth.to(delta.dtype)
        # The layer once more, on what its inputs grow by: with a multiplier, W and dW have different inputs. Not its
        # call, whose hooks would come back here.
        grown = x * growth.to(x.dtype)
        own: Tensor = layer.forward(grown)
        return own - shift + self.delta(x + grown) * self.options.scale

    @torch.no_grad()
    def scale_norm(self, limit: float) -> tuple[Tensor, Tensor]:
        """All factors take an equal share, as in sd-scripts."""
        if self.dora_scale is not None:
            raise UserError("scale_weight_norms has no meaning for DoRA, whose magnitudes are trained: leave it out")
        norm = self.norm()
        ratio = (limit / norm).clamp(max=1.0)
        for factor in self.parameters():
            if factor.requires_grad:
                factor.mul_(ratio ** (1 / self.factors))
        return norm * ratio, ratio < 1.0

    def delta_weight(self, weight: Tensor) -> Tensor:
        change = self.product(weight)
        if self.dora_scale is None:
            return change
        return (weight.float() + change) * self._gain(weight, self.dora_scale) - weight.float()

    def _gain(self, weight: Tensor, magnitude: Tensor) -> Tensor:
        """What W + dW is multiplied with, in the magnitudes' shape, fp32."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            norms = _norms(weight.float() + self.product(weight), _on_out(magnitude))
        return magnitude.float() / norms.clamp(min=torch.finfo(norms.dtype).tiny)

    @classmethod
    def rows_of(cls, tensors: AdapterTensors) -> Mapping[str, int]:
        rows = super().rows_of(tensors)
        return {**rows, DORA: 0} if DORA in tensors and _on_out(tensors[DORA]) else rows

    @classmethod
    def cut(cls, tensors: AdapterTensors, rows: Sequence[int]) -> list[AdapterTensors]:
        _refuse_by_input(tensors)
        return super().cut(tensors, rows)

    @classmethod
    def join(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        magnitudes = [pieces[i][DORA] for i in sorted(pieces) if DORA in pieces[i]]
        if not magnitudes:
            return cls.join_factors(pieces, rows)
        if len(magnitudes) < len(rows):
            raise UserError("DoRA of some pieces of a fused layer lacks the magnitudes of the others")
        for piece in pieces.values():
            _refuse_by_input(piece)
        factors = {i: {leaf: t for leaf, t in piece.items() if leaf != DORA} for i, piece in pieces.items()}
        return cls.join_factors(factors, rows) | {DORA: torch.cat(magnitudes)}

    @classmethod
    def join_factors(cls, pieces: Mapping[int, AdapterTensors], rows: Sequence[int]) -> AdapterTensors:
        """`join` of what is not DoRA's."""
        return super().join(pieces, rows)


def dora_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `AdditiveOptions` for the tensors of a file."""
    return {"dora_wd": True, "wd_on_out": _on_out(tensors[DORA])} if DORA in tensors else {}


def peft_magnitude(magnitude: Tensor) -> Tensor:
    """DoRA's magnitudes as PEFT shapes them: (out,), or (1, out, 1, 1) of a convolution. Errors: `UserError` for
    magnitudes by input column."""
    if not _on_out(magnitude):
        raise UserError(
            "PEFT's names have no place for DoRA with magnitudes by input column (wd_on_out=False); choose kohya or "
            "comfy"
        )
    return magnitude.flatten() if magnitude.ndim == 2 else magnitude.transpose(0, 1)


def no_dora(kind: type[Adapter], tensors: AdapterTensors) -> None:
    """Errors: `UserError` for DoRA, of a kind that PEFT has without it."""
    if DORA in tensors:
        raise UserError(f"PEFT has no {kind.__name__} with DoRA; save with --dialect kohya")


def _on_out(magnitude: Tensor) -> bool:
    """Whether DoRA's magnitudes are one per output row; ComfyUI looks at the shape as well."""
    return len(magnitude) > 1 or magnitude.numel() == 1


def _refuse_by_input(tensors: AdapterTensors) -> None:
    if DORA in tensors and not _on_out(tensors[DORA]):
        raise UserError(
            "DoRA with magnitudes by input column (wd_on_out=False) has no exact form for a part of a layer"
        )


def _magnitudes(base: nn.Module, on_out: bool) -> Tensor:
    """Those of a layer's weight: where it is kept in fewer bits, as it was before, or the adapter would scale the
    weight that it is used on by what the norms have lost, 0.4 % in nf4."""
    norms = getattr(base, "norms", None)
    if norms is None:
        return _norms(cast(Tensor, base.weight).detach().float(), on_out)
    sizes = (-1, 1) if on_out else (1, -1)
    found: Tensor = norms[0 if on_out else 1].clone()
    return found.view(*sizes, *[1] * (cast(Tensor, base.weight).ndim - 2))


def _norms(weight: Tensor, on_out: bool) -> Tensor:
    """(out, 1, ...), or (1, in, ...): the norm of each row or column of a weight."""
    others = [d for d in range(weight.ndim) if d != (0 if on_out else 1)]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norms
