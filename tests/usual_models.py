"""Make a family's `shapes.json.gz`, by which its adapters are read without a model: `python tests/usual_models.py FAMILY`.

The tables are those of real files, by component and native name; `USUAL` of the family's `tests/tinies/FAMILY.py` says
which files: variant -> the tensors of a single file.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path

from sparse import sparse
from tinies.cases import modules

from sfumato import families
from sfumato.models.components import open_model
from sfumato.models.reference import SHAPES, UsualModels

FAMILIES = Path(families.__file__).parent


def of(name: str) -> UsualModels:
    """The shapes of a family's usual models: variant -> component -> native name -> shape."""
    family = families.family(name)
    module = next(m for m in modules() if m.__name__ == f"tinies.{name}")
    found = {}
    for variant, tensors in module.USUAL.items():
        with tempfile.TemporaryDirectory() as folder:
            path = sparse(Path(folder) / "model.safetensors", tensors())
            source = open_model(
                path, family.components, family.title, given={}, passthrough_keys=family.passthrough_keys
            )
            found[variant] = {part: weights.shapes() for part, weights in source.components.items() if part != "vae"}
    return found


if __name__ == "__main__":
    for each in sys.argv[1:]:
        text = json.dumps(of(each), separators=(",", ":"))
        (FAMILIES / each / SHAPES).write_bytes(gzip.compress(text.encode(), mtime=0))
