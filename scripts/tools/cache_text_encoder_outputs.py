"""Runs the command lines of kohya's tools/cache_text_encoder_outputs.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sfumato.cli.kohya_cache import run

if __name__ == "__main__":
    raise SystemExit(run("cache_text_encoder_outputs", sys.argv[1:]))
