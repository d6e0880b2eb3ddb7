"""Runs command lines of kohya's sd3_minimal_inference.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sfumato.cli.kohya_inference import run

if __name__ == "__main__":
    raise SystemExit(run("sd3_minimal_inference", sys.argv[1:]))
