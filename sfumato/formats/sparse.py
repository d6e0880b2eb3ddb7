"""Weight files of full size that take no room: a real header, and a hole where the values would be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}


def sparse(path: Path, table: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """A safetensors file with tensors of these names and shapes, all of zeros."""
    at, entries = 0, {}
    for name, shape in table.items():
        size = math.prod(shape) * BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return path
