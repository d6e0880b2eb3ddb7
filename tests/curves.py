"""Write tests/fixtures/curves.json anew, after a change that should alter numbers: `python tests/curves.py` (or the names of some cases)."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_fixtures import make_images
from runs.test_families import CURVES, curve
from tinies.cases import cases

found = json.loads(CURVES.read_text()) if CURVES.exists() else {}
for case in cases():
    if case.name in sys.argv[1:] or len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            found[case.name] = curve(
                case, case.write(Path(folder) / "model"), make_images(Path(folder)), Path(folder) / "out"
            )
            print(case.name, f"{found[case.name][0]:.4f} -> {found[case.name][-1]:.4f}")
CURVES.write_text(json.dumps(found, indent=1) + "\n")
