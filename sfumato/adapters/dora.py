"""DoRA: LoRA with the magnitude and the direction of the layer's weight trained apart (arXiv:2402.09353).

The same as `lora` with `dora_wd=True`; what DoRA is stands in `base.py`, for other kinds have it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sfumato.adapters.base import LayerOptions
from sfumato.adapters.lora import LoRA, LoRAOptions
from sfumato.formats.dialect import DORA


@dataclass(frozen=True, slots=True, kw_only=True)
class DoRAOptions(LoRAOptions):
    dora_wd: bool = True


class DoRA(LoRA):
    """LoRA with the magnitude and the direction of the layer's weight trained apart: `lora` with `dora_wd=True`. As in
    PEFT, no gradient goes through the norm (in LyCORIS one does); a multiplier acts on the whole change of the weight
    (in LyCORIS on the magnitude alone)."""

    Options: ClassVar[type[LayerOptions]] = DoRAOptions

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> LayerOptions | None:
        return super().read(tensors) if DORA in tensors else None


ADAPTER = DoRA
