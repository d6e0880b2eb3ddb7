"""Runs a launcher of `scripts/` in this process or a fork of it: what a new one would spend on imports is most of a test's time."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

SCRIPTS = Path(__file__).parents[1] / "scripts"


def launch(script: str, words: Sequence[str], folder: Path) -> str:
    """`python scripts/SCRIPT.py WORDS` as from `folder`, which takes the place of the home folder; returns what it printed on stderr."""
    path, text, here = str(SCRIPTS / f"{script}.py"), io.StringIO(), Path.cwd()
    home = {"HOME": str(folder), "USERPROFILE": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    with (
        patch.object(sys, "argv", [path, *words]),
        patch.object(sys, "path", [*sys.path]),
        patch.dict(os.environ, home),
    ):
        os.chdir(folder)
        try:
            with contextlib.redirect_stderr(text):
                runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            assert not end.code, text.getvalue()[-3000:]
        finally:
            os.chdir(here)
    return text.getvalue()


def forked(job: Callable[..., Any], *args: Any) -> int | None:
    """Does a job in a process that has already imported what this one has; returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=job, args=args)
    process.start()
    process.join(600)
    process.kill()  # one that hangs
    return process.exitcode


def torchrun(words: Sequence[str], script: str, flags: Sequence[str], folder: Path) -> None:
    """`torchrun WORDS scripts/SCRIPT.py FLAGS`, whose processes are forked. It takes signals over: to be `forked` itself."""
    from torch.distributed import run

    config, *_ = run.config_from_args(run.parse_args([*words, script]))
    run.elastic_launch(replace(config, start_method="fork"), launch)(script, flags, folder)
