"""Runs the command lines of kohya's tools/merge_models.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sfumato.cli.kohya_checkpoints import run

if __name__ == "__main__":
    raise SystemExit(run("merge_models", sys.argv[1:]))
