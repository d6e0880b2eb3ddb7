"""Runs command lines of kohya's anima_train_network.py under python, accelerate launch and torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sfumato.cli.kohya import run

if __name__ == "__main__":
    raise SystemExit(run("anima_train_network", sys.argv[1:]))
