"""kohya's minimal inference scripts under their old names."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli import main
from sfumato.cli.inference import run_command
from sfumato.cli.inference_flags import SCRIPTS, parse


def run(script: str, argv: Sequence[str]) -> int:
    """Run a command line of kohya's script of this name (without `.py`); the exit code."""
    return main.guarded(lambda: run_command(parse(f"{script}.py", SCRIPTS[script], argv)))
