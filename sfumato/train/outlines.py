"""Models of real sizes without files: outlines from the shapes of usual checkpoints, whole or with fewer blocks, and
weights that chance gives."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from sfumato import families
from sfumato.adapters.merging import Change
from sfumato.config import FamilyOptions
from sfumato.errors import UserError, nearest
from sfumato.formats.lazy import Lazy
from sfumato.formats.sparse import sparse
from sfumato.models.base import Family, Models
from sfumato.models.components import Component, ComponentWeights
from sfumato.models.detection import Shapes
from sfumato.models.key_formats import NATIVE
from sfumato.models.loading import merge_when_read, outline_parts
from sfumato.models.reference import usual_models
from sfumato.tensors.random import generator

PIECE = (1 << 20) + 7
"""Random numbers that are made; large tensors repeat them, at other places each time."""
Parts = Mapping[str, Shapes]
"""Component -> native name -> shape."""


def usual(family: str, variant: str = "") -> Parts:
    """Tensors of the model that people have of a family, the VAE's left out. `variant`: "" is the first. Errors:
    `UserError`."""
    known = usual_models(Path(families.__file__).parent / family)
    if not known:
        raise UserError(f"{family}: sfumato knows no usual model's sizes; name a checkpoint with --model")
    if variant and variant not in known:
        raise UserError(f"{family}: there is no {variant!r}{nearest(variant, known)} (there are {', '.join(known)})")
    return known[variant or next(iter(known))]


def fewer(shapes: Shapes, share: float) -> dict[str, tuple[int, ...]]:
    """Shapes with this share of the blocks in each list of three or more of at most three kinds; at least one of each
    kind stays. The lists of U-Nets, whose blocks all differ, stay whole, those within them do not."""
    found = {name: tuple(shape) for name, shape in shapes.items()}
    for prefix in _lists(shapes):
        blocks = _blocks(found, prefix)
        runs = [list(run) for _, run in groupby(blocks)]
        if len(runs) > 3:
            continue
        kept = [block for run in runs for block in run[: math.ceil(share * len(run))]]
        found = {name: shape for name, shape in found.items() if not name.startswith(f"{prefix}.")}
        found |= {f"{prefix}.{i}.{name}": shape for i, block in enumerate(kept) for name, shape in block.items()}
    return found


def _lists(shapes: Shapes) -> list[str]:
    """Where three or more parts stand that only a number tells apart, outer lists before those within."""
    numbers: dict[str, set[str]] = {}
    for name in shapes:
        for m in re.finditer(r"\.(\d+)(?=\.)", name):
            numbers.setdefault(name[: m.start()], set()).add(m[1])
    return sorted(prefix for prefix, each in numbers.items() if len(each) > 2)


def _blocks(shapes: Shapes, prefix: str) -> list[dict[str, tuple[int, ...]]]:
    """The parts of a list: rest of the name -> shape."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if name.startswith(f"{prefix}."):
            number, _, rest = name[len(prefix) + 1 :].partition(".")
            found.setdefault(int(number), {})[rest] = tuple(shape)
    return [found[i] for i in sorted(found)]


def outline_of(family: Family, options: FamilyOptions, parts: Parts, folder: Path) -> Models:
    """The outline of a model with tensors of these shapes, whose file, without values, is put into the folder; of the
    VAE it has the scaling alone. Errors: `UserError` for shapes of no model of the family."""
    table: dict[str, tuple[int, ...]] = {}
    for part in family.components:
        if part.name in parts:
            table |= _in_file(part, parts[part.name])
    models = outline_parts(family, str(sparse(folder / "model.safetensors", table)), options)
    options, source = family.complete(models.options, models.source)
    vae = next(part for part in family.components if part.name == "vae")
    scaling = ComponentWeights(component=vae, tensors=Lazy({}), key_format=NATIVE, prefix=None, where=source.path)
    return replace(models, options=options, source=replace(source, components={**source.components, "vae": scaling}))


def _in_file(part: Component, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A component's tensors as a single file names them."""
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {part.prefixes[0] + name: tuple(t.shape) for name, t in part.single(shapes).write(meta).items()}


def randomise(models: Models, components: Sequence[str] = ("denoiser",)) -> None:
    """Have these components be read with small random weights in the place of those in their files; norms that scale by
    1, and no biases."""
    piece = torch.randn(PIECE, generator=generator(0, "random weights")) * 0.02
    made = {
        name: {key: Change(partial(_drawn, piece, key)) for key in models.source.components[name].shapes()}
        for name in components
    }
    merge_when_read(models, made)


def _drawn(piece: Tensor, name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    for part in torch.split(tensor.view(-1), PIECE):
        part.copy_(piece[: len(part)])
    return tensor
