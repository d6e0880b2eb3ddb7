"""What the tools write: never over what they read; and where they compute."""

from __future__ import annotations

from pathlib import Path

import torch

from sfumato.errors import UserError
from sfumato.formats import files

ENDINGS = (".safetensors", *files.PICKLES)
"""Of files of weights."""


def check_output(out: Path, *inputs: Path) -> None:
    """Errors: `UserError` if `out` is one of the inputs, or in a folder that does not exist."""
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise UserError(f"{out}: is also read; choose another name for the result")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it first")


def check_output_file(out: Path, *inputs: Path) -> None:
    """The same of a single file of weights. Errors: `UserError`, also for a folder, and for another ending."""
    check_output(out, *inputs)
    if out.is_dir() or out.suffix not in ENDINGS:
        raise UserError(f"{out}: a single file is written here: expected NAME.safetensors")


def check_device(name: str) -> None:
    """Errors: `UserError` for a device that torch does not know, or that is not there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name}: cannot be used ({reason}); leave it out for the CPU") from None


def check_rank(rank: int | None, flag: str = "rank") -> None:
    """Errors: `UserError` for a rank below 1. None: none is given."""
    if rank is not None and rank < 1:
        raise UserError(f"--{flag} {rank}: expected 1 or more")
