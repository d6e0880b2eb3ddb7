"""What the tools write: never over what they read."""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import UserError


def check_output(out: Path, *inputs: Path) -> None:
    """Errors: `UserError` if `out` is one of the inputs, or in a folder that does not exist."""
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise UserError(f"{out}: is also read; choose another name for the result")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it first")
