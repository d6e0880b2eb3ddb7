"""Make a key table, the names and shapes of a real file: `python tests/key_table.py NAME FILE ...` (the shards of one model together).

Only headers are read; the table is `tests/fixtures/keys/NAME.json.gz`. NAME: "flux_dev.transformer", "adapter.flux.lora".
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from sfumato.formats.files import read_header

KEYS = Path(__file__).parent / "fixtures" / "keys"


def main(name: str, *paths: str) -> Path:
    """Write the table and return its path."""
    shapes = {key: info.shape for path in paths for key, info in read_header(path).tensors.items()}
    target = KEYS / f"{name}.json.gz"
    # Without a time in it, so that the same file gives the same bytes.
    target.write_bytes(gzip.compress(json.dumps(dict(sorted(shapes.items()))).encode(), mtime=0))
    return target


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
