"""Runs the command lines of kohya's networks/extract_lora_from_dylora.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sfumato.cli.kohya_tools import run

if __name__ == "__main__":
    raise SystemExit(run("extract_lora_from_dylora", sys.argv[1:]))
