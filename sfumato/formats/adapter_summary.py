"""The kinds, ranks and alphas of an adapter file, from its header and its alphas' few bytes; imports no torch."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.formats.header import Header, TensorInfo

_LEAVES: tuple[tuple[str, str, int | None], ...] = (
    # pattern of a name's end, kind, the dimension that is the rank (or the size of a block)
    (r"(lora_down|lora_A(\.[^.]+)?|lora\.(lora_)?down|lora_linear_layer\.down|_lora\.down|\bdown)\.weight", "LoRA", 0),
    (r"hada_w1_b", "LoHa", 0),
    (r"lokr_w[12]_b", "LoKr", 0),
    (r"lokr_w2", "LoKr", None),
    (r"oft_blocks", "OFT", -1),
    (r"oft_R\.weight", "OFT in PEFT's form", None),
    (r"oft_diag", "OFT", -1),
    (r"on_input", "(IA)3", None),
    (r"a1\.weight", "GLoRA", 0),
    (r"diff", "full difference", None),
    (r"w_norm|b_norm|diff_b", "norms and biases", None),
)
_MAGNITUDES = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_FORMATS = {"F32": "<f", "F64": "<d", "F16": "<e", "I64": "<q", "I32": "<i"}


def summary(header: Header, path: Path | None) -> dict[str, Any]:
    """`kinds`: layers of each; `ranks`: layers of each (of OFT: the size of a block); `alphas`: layers of each.

    `path`: of the safetensors file, from which alphas are read; None: they are left out.
    """
    layers = _layers(header.tensors)
    dora = {name.removesuffix(end) for name in header.tensors for end in _MAGNITUDES if name.endswith(end)}
    kinds, ranks = Counter[str](), Counter[int]()
    for layer, (kind, rank) in layers.items():
        kinds[f"{kind} with DoRA" if layer in dora else kind] += 1
        if rank is not None:
            ranks[rank] += 1
    return {
        "kinds": dict(kinds.most_common()),
        "ranks": dict(sorted(ranks.items())),
        "alphas": dict(sorted(Counter(_alphas(header, path).values()).items())) if path else {},
    }


def _layers(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, int | None]]:
    """Layer -> its kind and rank."""
    found: dict[str, tuple[int, str, int | None]] = {}
    patterns = [(re.compile(rf"(.*?)[._]?({pattern})"), kind, dim) for pattern, kind, dim in _LEAVES]
    for name, info in tensors.items():
        for order, (pattern, kind, dim) in enumerate(patterns):
            if m := pattern.fullmatch(name):
                of = "BOFT" if kind == "OFT" and len(info.shape) == 4 else kind
                rank = info.shape[dim] if dim is not None and info.shape else None
                if m[1] not in found or order < found[m[1]][0]:
                    found[m[1]] = order, of, rank
                break
    return {layer: (kind, rank) for layer, (_, kind, rank) in found.items()}


def _alphas(header: Header, path: Path) -> dict[str, float]:
    """Name -> value of each tensor that is an alpha."""
    places = {name: i for name, i in header.tensors.items() if name.endswith(".alpha") and i.end - i.start <= 8}
    found = {}
    with path.open("rb") as file:
        for name, info in places.items():
            file.seek(header.size + info.start)
            data = file.read(info.end - info.start)
            if info.dtype == "BF16":
                info, data = TensorInfo("F32", info.shape, 0, 4), b"\0\0" + data
            if info.dtype in _FORMATS and len(data) == struct.calcsize(_FORMATS[info.dtype]):
                found[name] = round(float(struct.unpack(_FORMATS[info.dtype], data)[0]), 6)
    return found
