"""Make a key table, the names and shapes of a real file: `python tests/key_table.py NAME FILE ...` (the shards of one model together).

Only headers are read; the table is `tests/fixtures/keys/NAME.json.gz`. NAME: "flux_dev.transformer", "adapter.flux.lora".
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfumato.formats.files import read_header

KEYS = Path(__file__).parent / "fixtures" / "keys"


def write(name: str, shapes: Mapping[str, Sequence[int]]) -> Path:
    """Write a table and return its path. Without a time in it, so that the same names and shapes give the same bytes."""
    target = KEYS / f"{name}.json.gz"
    target.write_bytes(gzip.compress(json.dumps(dict(sorted(shapes.items()))).encode(), mtime=0))
    return target


def main(name: str, *paths: str) -> Path:
    """The table of some files."""
    return write(name, {key: info.shape for path in paths for key, info in read_header(path).tensors.items()})


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
