"""Write tests/fixtures/curves/ anew, after a change that should alter numbers: `python tests/curves.py` (or the names of
some cases)."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_fixtures import make_images
from runs.test_families import curve, pinned
from tinies.cases import cases

for case in cases():
    if case.name in sys.argv[1:] or len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            losses = curve(case, case.write(where / "model"), make_images(where), where / "out")
        path = pinned(case)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**found, case.name: losses}, indent=1) + "\n", encoding="utf-8")
        print(case.name, f"{losses[0]:.4f} -> {losses[-1]:.4f}")
