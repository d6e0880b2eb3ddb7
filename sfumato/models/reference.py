"""The usual models of a family, by names and shapes alone: enough to read and write adapters without a model."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import nn

from sfumato.config import FamilyOptions
from sfumato.formats.dialect import Dialect, ModulePath
from sfumato.models.base import Family, Models
from sfumato.models.detection import Shapes

SHAPES = "shapes.json.gz"
"""In a family's folder; `tests/usual_models.py` makes it."""
UsualModels = dict[str, dict[str, dict[str, tuple[int, ...]]]]
"""variant -> component -> native name of a tensor -> shape"""


@cache
def usual_models(folder: Path) -> UsualModels:
    """Those of the family in this folder; empty where it has none."""
    if not (folder / SHAPES).exists():
        return {}
    text = gzip.decompress((folder / SHAPES).read_bytes())
    return {
        variant: {part: {name: tuple(shape) for name, shape in shapes.items()} for part, shapes in parts.items()}
        for variant, parts in json.loads(text).items()
    }


def layers(parts: Mapping[str, Shapes]) -> dict[ModulePath, tuple[int, ...]]:
    """The layers that may have an adapter -> the shape of their weight."""
    return {
        (part, name.removesuffix(".weight")): shape
        for part, shapes in parts.items()
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4)
    }


def dialects(family: Family, parts: Mapping[str, Shapes]) -> Mapping[str, Dialect]:
    """Adapter names of a model with tensors of these shapes."""
    denoiser = next(c for c in family.components if c.name == "denoiser").net(parts["denoiser"], {})
    encoders = {name: nn.Module() for name in parts if name != "denoiser"}
    return Models(family, FamilyOptions(), denoiser, encoders, {}, None).dialects
