"""A LoRA file with smaller ranks: layer by layer the nearest change that the rank allows, in the file's own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.data.store import Progress
from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.adapter_check import check_adapter
from sfumato.formats.clients import WORDS
from sfumato.formats.dialect import ALPHA, DORA, DOWN, READ_AS, UP
from sfumato.formats.metadata import hashes
from sfumato.tensors.low_rank import product
from sfumato.tools.written import check_device, check_output_file, check_rank

Method = Literal["sv_ratio", "sv_fro", "sv_cumulative"]
_LEAVES = {DOWN: DOWN, UP: UP, ALPHA: ALPHA, **READ_AS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resizing:
    """How small a layer's rank becomes."""

    rank: int
    """The most; for linear layers and 1x1 convolutions."""
    conv_rank: int | None = None
    """The most for larger convolutions; None: `rank`."""
    method: Method | None = None
    """What a smaller rank must keep; None: every rank is the most there may be.

    sv_ratio: singular values of at least the largest one / `parameter`. sv_fro: `parameter` of the change's Frobenius
    norm. sv_cumulative: `parameter` of the sum of its singular values.
    """
    parameter: float | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_rank(self.conv_rank, "conv_rank")
        wrong = []
        if self.method is None and self.parameter is not None:
            wrong.append("dynamic_param: does nothing without dynamic_method; leave it out")
        if self.method == "sv_ratio" and not (self.parameter or 0) >= 1:
            wrong.append("dynamic_param: sv_ratio expects a ratio of 1 or more, such as 10")
        if self.method in ("sv_fro", "sv_cumulative") and not 0 < (self.parameter or 0) <= 1:
            wrong.append(f"dynamic_param: {self.method} expects a share, above 0 up to 1, such as 0.9")
        if wrong:
            raise UserError(*wrong)

    def of(self, singular: Tensor, *, conv: bool) -> int:
        """The rank for a layer of these singular values, largest first."""
        most = min(len(singular), self.conv_rank if conv and self.conv_rank else self.rank)
        s = singular.double()
        if self.method is None or self.parameter is None:
            return most
        if not s[0] > 0:
            return 1
        if self.method == "sv_ratio":
            needed = int((s >= s[0] / self.parameter).sum())
        else:
            kept = s.square().cumsum(0) if self.method == "sv_fro" else s.cumsum(0)
            share = self.parameter**2 if self.method == "sv_fro" else self.parameter
            needed = int((kept / kept[-1] < share * (1 - 1e-12)).sum()) + 1
        return min(needed, most)


def resize(
    source: Path,
    out: Path,
    how: Resizing,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `source` with smaller ranks; the scale alpha / rank of every layer stays, and so do names and DoRA's
    magnitudes.

    Returns JSON-able facts: `layers` of {name, rank, new_rank, kept (share of the Frobenius norm)}. Errors: `UserError`
    for a file that is not a LoRA, or is damaged, or would be overwritten.
    """
    check_output_file(out, source)
    check_device(str(device))
    tensors = files.load(source)
    check_adapter(tensors, str(source))
    layers = lora_layers(source, tensors)
    written: dict[str, Tensor] = dict(tensors)
    facts = []
    for done, (name, keys) in enumerate(layers.items(), 1):
        down, up = tensors[keys[DOWN]], tensors[keys[UP]]
        u, s, vh = product(up.to(device).flatten(1), down.to(device).flatten(1))
        rank = how.of(s, conv=down.ndim == 4 and tuple(down.shape[2:]) != (1, 1))
        root = s[:rank].sqrt()
        written[keys[UP]] = (u[:, :rank] * root).reshape(len(up), rank, *up.shape[2:]).to(up.dtype).cpu()
        written[keys[DOWN]] = (root[:, None] * vh[:rank]).reshape(rank, *down.shape[1:]).to(down.dtype).cpu()
        if ALPHA in keys:
            alpha = tensors[keys[ALPHA]]
            written[keys[ALPHA]] = (alpha.float() / len(down) * rank).to(alpha.dtype)
        whole = s.square().sum().sqrt()
        kept = float(s[:rank].square().sum().sqrt() / whole) if whole > 0 else 1.0
        facts.append({"name": name, "rank": len(down), "new_rank": rank, "kept": kept})
        if progress:
            progress(done, len(layers))
    if dtype:
        written = {name: t.to(dtype) for name, t in written.items()}
    files.check_finite(written, f"the adapter {out.name}", dtype)
    metadata = _metadata(
        files.read_header(source).metadata, how, {float(written[k[ALPHA]]) for k in layers.values() if ALPHA in k}
    )
    files.save(out, written, {**metadata, **hashes(written, metadata)})
    return {"out": str(out), "layers": facts}


def lora_layers(source: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Layer -> its keys by DOWN, UP, ALPHA. Errors: `UserError` if a tensor is not a LoRA's."""
    layers: dict[str, dict[str, str]] = {}
    odd = []
    for key in tensors:
        if key.endswith((f".{DORA}", ".lora_magnitude_vector")) or key.startswith(WORDS):
            continue  # goes with the layer, or beside the adapter, as it is
        spelled = next((s for s in _LEAVES if key.endswith(f".{s}")), None)
        if spelled is None:
            odd.append(key)
        else:
            layers.setdefault(key[: -len(spelled) - 1], {})[_LEAVES[spelled]] = key
    odd += [key for keys in layers.values() if not {DOWN, UP} <= keys.keys() for key in keys.values()]
    if not odd:
        _check_factors(source, tensors, layers)
    else:
        raise UserError(
            f"{source}: {odd[0]!r} is not part of a LoRA's pair of factors ({len(odd)} such tensors); only LoRA (with "
            "or without DoRA's magnitudes) has smaller ranks"
        )
    return layers


def _check_factors(source: Path, tensors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, str]]) -> None:
    """Errors: `UserError` for factors of two ranks, such as a transposed one."""
    for name, keys in layers.items():
        up, down = tensors[keys[UP]].shape, tensors[keys[DOWN]].shape
        if up[1] != down[0]:
            raise UserError(f"{source}: {name}: factors of shapes {list(up)} and {list(down)} are of no common rank")


def _metadata(old: Mapping[str, str], how: Resizing, alphas: set[float]) -> dict[str, str]:
    how_text = f"{how.method}: {how.parameter}, at most {how.rank}" if how.method else f"{how.rank}"
    comment = f"dimension is resized from {old.get('ss_network_dim', 'unknown')} to {how_text}; "
    return {
        **{name: value for name, value in old.items() if not name.startswith("sshs_")},
        "ss_network_dim": "Dynamic" if how.method else str(how.rank),
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
        "ss_training_comment": comment + old.get("ss_training_comment", ""),
    }
