"""A LoRA of what a fine-tuned checkpoint differs in from the one it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import __version__, adapters, families
from sfumato.adapters import AdapterPlan
from sfumato.adapters import files as adapter_files
from sfumato.adapters.insert import choose
from sfumato.data.store import Progress
from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.formats import files
from sfumato.formats.dialect import ALIASES, AdapterTensors, ModulePath, check_dialect
from sfumato.formats.metadata import hashes
from sfumato.formats.planned import Writable, made
from sfumato.models.base import Models
from sfumato.models.loading import outline_parts
from sfumato.tensors.low_rank import truncated
from sfumato.tensors.random import generator
from sfumato.tools.adapter_file import as_lora
from sfumato.tools.written import check_device, check_output_file, check_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """What is taken of the difference."""

    rank: int
    conv_rank: int | None = None
    """Rank on convolutions larger than 1x1; None: they are left out."""
    min_diff: float = 0.0
    """A layer of a text encoder whose largest difference is at most this is left out."""
    clamp_quantile: float | None = None
    """sd-scripts cuts the factors' outliers off beyond this quantile, 0.99; None: they are as they are."""
    dialect: str = "kohya"
    dtype: torch.dtype = torch.float16
    seed: int = 0
    """Of the randomised decomposition."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The family's own, spelled as its flags, of both models: files of parts, say."""

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_rank(self.conv_rank, "conv_rank")


def extract(
    original: Path,
    tuned: Path,
    out: Path,
    how: Extraction,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the LoRA that turns `original` into `tuned`, as far as its ranks allow, with two tensors in memory at a
    time.

    A layer whose difference is no more than the rounding of the coarser of the two files' number formats is left out.
    Returns JSON-able facts: `layers` of {component, path, rank, error (Frobenius norm of what is missing, as a share of
    the difference's own)}, and `unheld`, the tensors that differ and that no LoRA holds (norms, biases, layers that are
    not adapted). Errors: `UserError` for models of two kinds, or that do not differ.
    """
    check_output_file(out, original, tuned)
    check_device(str(device))
    check_dialect(how.dialect)
    name = detect_file(original, "the original model").family
    if (other := detect_file(tuned, "the tuned model").family) != name:
        raise UserError(f"{tuned} is a model of {other}, {original} one of {name}: there is no difference to take")
    family, facts = families.family(name), families.facts(name)
    base, changed = (outline_parts(family, str(path), facts.options(**how.options)) for path in (original, tuned))
    ranks = _ranks(base, how)
    pairs = list(_pairs(base, changed))
    state: dict[ModulePath, AdapterTensors] = {}
    layers, unheld = [], []
    for done, (component, tensor, before, after) in enumerate(pairs, 1):
        difference = _difference(made(before).to(device), made(after).to(device), how, text=component != "denoiser")
        path = component, tensor.removesuffix(".weight")
        if difference is not None and path not in ranks:
            unheld.append(f"{component}.{tensor}")
        elif difference is not None:
            found = truncated(difference.flatten(1), ranks[path], generator(how.seed, "extract", tensor))
            state[path] = _tensors(found.up, found.down, difference, how)
            layers.append({"component": component, "path": path[1], "rank": len(found.down), "error": found.error})
        if progress:
            progress(done, len(pairs))
    if not state:
        raise UserError(f"{original} and {tuned} do not differ in any layer that a LoRA goes on")
    dialect = base.dialects[ALIASES.get(how.dialect, how.dialect)]
    tensors = {n: t.to(how.dtype) for n, t in adapter_files.write(dialect, state).items()}
    files.check_finite(tensors, f"the adapter {out.name}", how.dtype)
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{facts.architecture(base.options)}/lora",
        "modelspec.implementation": f"sfumato {__version__}",
        "modelspec.title": out.stem,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(how.rank),
        "ss_network_alpha": str(float(how.rank)),
        "ss_base_model_version": facts.base_model_version(base.options),
        "ss_v2": str(bool(getattr(base.options, "v2", False))),
    }
    files.save(out, tensors, {**metadata, **hashes(tensors, metadata)})
    return {"out": str(out), "layers": layers, "unheld": unheld}


def _ranks(models: Models, how: Extraction) -> dict[ModulePath, int]:
    """The layers that LoRA goes on, with the rank of each."""
    plan = AdapterPlan(kind=adapters.kind("lora"), rank=1, conv_rank=1 if how.conv_rank else None)
    target = partial(models.family.target_layer, models.options, plan)
    return {
        (component, t.path): how.conv_rank
        if how.conv_rank and getattr(t.layer, "kernel_size", (1, 1)) != (1, 1)
        else how.rank
        for component, sets in models.family.targets.items()
        if component in models.nets()
        for t in choose(models.nets()[component], component, sets, plan, target)
    }


def _pairs(base: Models, changed: Models) -> Iterator[tuple[str, str, Writable, Writable]]:
    """(component, native name, tensor of the one, tensor of the other). Errors: `UserError` for nets of other names or
    shapes."""
    for component in base.nets():
        if component not in changed.nets():
            continue
        parts = (models.source.components[component] for models in (base, changed))
        one, other = (weights.planned(coded=torch.float32) for weights in parts)
        odd = [n for n in one.keys() | other.keys() if n not in one or n not in other or one[n].shape != other[n].shape]
        if odd:
            raise UserError(
                f"{component}: {min(odd)!r} is not in both models, or has another shape ({len(odd)} such tensors): "
                "they are not models of one kind"
            )
        for name, before in one.items():
            yield component, name, before, other[name]


def _difference(before: Tensor, after: Tensor, how: Extraction, *, text: bool) -> Tensor | None:
    """The difference, fp32; None if there is none to speak of."""
    if not before.dtype.is_floating_point or not before.numel():
        return None
    coarse = max(torch.finfo(before.dtype).eps, torch.finfo(after.dtype).eps)
    difference = after.float() - before.float()
    most = difference.abs()
    rounding = (coarse * before.float().abs()).clamp(min=torch.finfo(torch.float16).smallest_normal * coarse)
    if bool((most <= rounding).all()) or (text and float(most.max()) <= how.min_diff):
        return None
    return difference


def _tensors(up: Tensor, down: Tensor, difference: Tensor, how: Extraction) -> AdapterTensors:
    if how.clamp_quantile is not None:
        # torch.quantile takes no more than 16 million numbers.
        values = torch.cat([up.flatten(), down.flatten()]).abs().sort().values
        limit = float(values[min(len(values) - 1, int(how.clamp_quantile * len(values)))])
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    return as_lora(up, down, tuple(difference.shape))
