"""Adapters merged into one adapter file: exactly, the ranks of LoRA side by side, or as the nearest LoRA of a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import __version__, families
from sfumato.adapters import files as adapter_files
from sfumato.adapters import from_tensors
from sfumato.data.store import Progress
from sfumato.errors import Mistakes, UserError
from sfumato.formats import files
from sfumato.formats.dialect import ALIASES, ALPHA, DORA, DOWN, UP, AdapterTensors, ModulePath, check_dialect
from sfumato.formats.metadata import hashes
from sfumato.models.base import Family
from sfumato.tensors.low_rank import Truncated, recompressed, truncated
from sfumato.tools import adapter_file
from sfumato.tools.adapter_file import AdapterFile
from sfumato.tools.convert_adapter import change
from sfumato.tools.written import check_output_file, check_rank
from sfumato.train.provenance import now

LORA = {DOWN, UP, ALPHA}
FULL = {"diff", "diff_b"}
PROPORTIONAL = (UP, "hada_w1_a", "lokr_w1", "lokr_w1_a")
"""Tensors that a layer's change is proportional to, of which it has one."""
Term = tuple[AdapterTensors, float]
"""A layer's tensors in one file, and their strength."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """Which adapters become one, and how it is written."""

    adapters: Sequence[tuple[Path, float]]
    """Files and their ratios."""
    out: Path
    rank: int | None = None
    """The largest rank of a layer: what exceeds it becomes the nearest LoRA of this rank. None: all is exact."""
    conv_rank: int | None = None
    """The same for convolutions larger than 1x1; None: `rank`."""
    block_weights: Sequence[Sequence[float]] = ()
    """Layer-wise weights, one list for each adapter, or one for all."""
    dialect: str = "kohya"
    dtype: torch.dtype | None = None
    """Number format of the result; None: the widest of those of the adapters."""
    family: str | None = None
    """Of the model, where the files do not show it."""
    model: str | None = None
    """A model of other sizes than the usual ones of its family; its header is read."""
    metadata: bool = True
    """Whether the result says what it was made of."""

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_rank(self.conv_rank, "conv_rank")


def join(what: Joining, progress: Progress | None = None) -> dict[str, Any]:
    """Write the sum of the adapters' changes, each times its ratio, as one adapter.

    Returns JSON-able facts: `layers` of {component, path, rank (None: not a LoRA), error (Frobenius norm of what is
    missing, as a share of the change's own)}, `error`, the same over all layers, and `left_out`, what is not in the
    result. Errors: `UserError` for files of two families, and for changes whose sum has no exact form, and nothing is
    written.
    """
    check_output_file(what.out, *(path for path, _ in what.adapters))
    check_dialect(what.dialect)
    read = [adapter_file.read(path, family=what.family, model=what.model) for path, _ in what.adapters]
    outline = _common(read)
    dialect = outline.dialects[ALIASES.get(what.dialect, what.dialect)]
    strengths = strengths_of(outline.family, [ratio for _, ratio in what.adapters], what.block_weights)
    state: dict[ModulePath, AdapterTensors] = {}
    layers: list[dict[str, Any]] = []
    missing, mistakes = Missing(), Mistakes()
    for done, path in enumerate(outline.layers, 1):
        terms = [(r.state[path], s(path)) for r, s in zip(read, strengths, strict=True) if path in r.state and s(path)]
        with mistakes:
            if terms:
                state[path] = _sum(path, terms, what, outline.layers[path], missing)
                rank = len(state[path][DOWN]) if DOWN in state[path] else None
                layers.append({"component": path[0], "path": path[1], "rank": rank, "error": missing.last})
        if progress:
            progress(done, len(outline.layers))
    if mistakes.messages:
        more = len(mistakes.messages) - 3
        raise UserError(*mistakes.messages[:3], *([f"... and {more} more such layers"] if more > 0 else []))
    if not state:
        raise UserError("nothing is left of the adapters: every ratio is 0")
    words, left_out = _words(read, kept=dialect.name != "peft")
    tensors = _cast(adapter_files.write(dialect, state) | words, what.dtype or _widest(read))
    files.check_finite(tensors, f"the adapter {what.out.name}", what.dtype)
    metadata = _metadata(what, read, state)
    files.save(what.out, tensors, {**metadata, **hashes(tensors, metadata)})
    return {"out": str(what.out), "layers": layers, "error": missing.share, "left_out": left_out}


def strengths_of(
    family: Family, ratios: Sequence[float], block_weights: Sequence[Sequence[float]]
) -> list[Callable[[ModulePath], float]]:
    """How strongly a layer of each adapter acts. Errors: `UserError` for layer-wise weights that are not the
    family's."""
    known = family.block_weights
    if not block_weights:
        return [lambda layer, ratio=ratio: ratio for ratio in ratios]  # type: ignore[misc]
    if known is None:
        raise UserError(f"layer-wise weights (lbws): {family.title} has no such blocks; leave them out")
    lengths = " or ".join(map(str, known.lists))
    odd = [len(each) for each in block_weights if len(each) not in known.lists]
    wrong = [f"lbws: a list of {n} numbers; expected {lengths} for {family.title}" for n in odd]
    if len(block_weights) not in (1, len(ratios)):
        wrong.append(f"lbws: {len(block_weights)} lists for {len(ratios)} adapters; give one for each, or one for all")
    if wrong:
        raise UserError(*wrong)
    each = list(block_weights) if len(block_weights) == len(ratios) else [block_weights[0]] * len(ratios)
    tables = [dict(zip(known.lists[len(weights)], weights, strict=True)) for weights in each]
    return [
        lambda layer, ratio=ratio, table=table: ratio * table.get(known.block(layer), 1.0)  # type: ignore[misc]
        for ratio, table in zip(ratios, tables, strict=True)
    ]


# --- layers ---


@dataclass(slots=True)
class Missing:
    """What ranks leave out."""

    left: float = 0.0
    whole: float = 0.0
    """Sums of squares."""
    last: float = 0.0
    """Of the layer that was made last, as a share."""

    def add(self, found: Truncated) -> None:
        kept, share = float(found.singular[: len(found.down)].double().square().sum()), found.error**2
        whole = kept / (1 - share) if share < 1 else 0.0
        self.left, self.whole, self.last = self.left + whole * share, self.whole + whole, found.error

    @property
    def share(self) -> float:
        """Over all layers that a rank limits."""
        return (self.left / self.whole) ** 0.5 if self.whole else 0.0


def _sum(
    path: ModulePath, terms: Sequence[Term], what: Joining, shape: tuple[int, ...], missing: Missing
) -> AdapterTensors:
    """The tensors of the sum of some changes of a layer. Errors: `UserError` if it has no exact form, and no rank is
    given."""
    missing.last = 0.0
    most = what.conv_rank if what.conv_rank and len(shape) == 4 and tuple(shape[2:]) != (1, 1) else what.rank
    if all(tensors.keys() == LORA for tensors, _ in terms):
        joined = _side_by_side(terms)
        if most is None or len(joined[DOWN]) <= most:
            return joined
        up, down = joined[UP].float() * (float(joined[ALPHA]) / len(joined[DOWN])), joined[DOWN].float()
        return _lora(recompressed(up.flatten(1), down.flatten(1), most), shape, missing)
    if most is not None:
        delta = sum(
            (change(path, tensors, torch.zeros(shape)) * strength for tensors, strength in terms), torch.zeros(shape)
        )
        return _lora(truncated(delta.flatten(1), most, torch.Generator().manual_seed(0)), shape, missing)
    if all(tensors.keys() <= FULL for tensors, _ in terms):
        names = {name for tensors, _ in terms for name in tensors}
        return {n: sum(t[n].float() * s for t, s in terms if n in t) for n in sorted(names)}  # type: ignore[misc]
    if len(terms) == 1:
        tensors, strength = terms[0]
        if strength == 1:
            return tensors
        if (name := next((n for n in PROPORTIONAL if n in tensors), None)) and DORA not in tensors:
            return {**tensors, name: tensors[name].float() * strength}
    kinds = " and ".join(sorted({from_tensors(tensors)[0].__name__ for tensors, _ in terms}))
    dora = ", with DoRA's magnitudes," if any(DORA in tensors for tensors, _ in terms) else ""
    raise UserError(
        f"{'.'.join(path)}: {kinds}{dora} cannot be added up or scaled exactly within one file; merge them into the "
        "model with --model, or give --rank N for the nearest LoRA where the change does not depend on the model"
    )


def _side_by_side(terms: Sequence[Term]) -> AdapterTensors:
    """LoRA whose ranks add up. Where all scales are alike, all numbers stay as they are."""
    scales = [strength * float(tensors[ALPHA]) / len(tensors[DOWN]) for tensors, strength in terms]
    common = max(scales, key=abs)
    ups = [
        tensors[UP] if scale == common else tensors[UP].float() * (scale / common)
        for (tensors, _), scale in zip(terms, scales, strict=True)
    ]
    wide = torch.float32 if len({t.dtype for t in ups}) > 1 else ups[0].dtype
    downs = [tensors[DOWN] for tensors, _ in terms]
    down = torch.cat([t.float() for t in downs] if len({t.dtype for t in downs}) > 1 else downs)
    return {DOWN: down, UP: torch.cat([t.to(wide) for t in ups], 1), ALPHA: torch.tensor(common * len(down))}


def _lora(found: Truncated, shape: tuple[int, ...], missing: Missing) -> AdapterTensors:
    missing.add(found)
    return adapter_file.as_lora(found.up, found.down, shape)


# --- files ---


def _common(read: Sequence[AdapterFile]) -> adapter_file.Outline:
    """The model that all files are for. Errors: `UserError` if there is none."""
    first = read[0]
    for other in read[1:]:
        odd = [layer for layer in other.state if other.outline.layers[layer] != first.outline.layers.get(layer)]
        if other.outline.family.name != first.outline.family.name or odd:
            of = [f"{each.path} is for {each.outline.family.title} {each.outline.variant}" for each in (first, other)]
            raise UserError(f"{', and '.join(of)}: they act on different layers")
    return first.outline


def _words(read: Sequence[AdapterFile], *, kept: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the words beside all adapters, and what is left out: of a word that two have, the later
    vectors; all of them unless they are `kept`."""
    words: dict[str, Tensor] = {}
    left_out = []
    for each in read:
        for key, tensor in each.words.items():
            if not kept:
                left_out.append(f"{key} of {each.path}: a word beside the adapter, for which diffusers refuses a file")
            elif key in words and not (words[key].shape == tensor.shape and torch.equal(words[key], tensor)):
                left_out.append(f"{key} of {each.path}: an earlier adapter has the same word, with other vectors")
            else:
                words[key] = tensor
    return words, left_out


def _widest(read: Sequence[AdapterFile]) -> torch.dtype:
    dtypes = {t.dtype for each in read for layer in each.state.values() for name, t in layer.items() if name != ALPHA}
    wide = next(iter(dtypes))
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Alphas stay in fp32, as they carry the ratios."""
    return {name: t if name.endswith(f".{ALPHA}") else t.to(dtype) for name, t in tensors.items()}


def _metadata(what: Joining, read: Sequence[AdapterFile], state: dict[ModulePath, AdapterTensors]) -> dict[str, str]:
    """What loaders read, and what it was made of."""
    old, family = read[0].metadata, read[0].outline.family
    facts = families.facts(family.name)
    ranks = {len(tensors[DOWN]) for tensors in state.values() if DOWN in tensors}
    alphas = {float(tensors[ALPHA]) for tensors in state.values() if ALPHA in tensors}
    found = {
        "ss_network_module": old.get("ss_network_module", "networks.lora"),
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": old.get("ss_base_model_version") or facts.base_model_version(facts.options()),
        "ss_v2": old.get("ss_v2", "False"),
    }
    if not what.metadata:
        return found
    architecture = old.get("modelspec.architecture") or f"{facts.architecture(facts.options())}/lora"
    titles = [each.metadata.get("modelspec.title") or each.path.stem for each in read]
    return found | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": old.get("modelspec.implementation") or f"sfumato {__version__}",
        "modelspec.title": what.out.stem,
        "modelspec.date": datetime.fromtimestamp(now()).replace(microsecond=0).isoformat(),
        "modelspec.merged_from": ", ".join(titles),
    }
