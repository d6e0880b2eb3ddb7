"""Command lines of the tools that make files of files: words in, a call of `sfumato/tools/` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.errors import UserError


def take_adapters(words: list[str], flag: str) -> list[tuple[Path, float]]:
    """Take a flag of several files off a command line, `--flag A 0.8 B 0.5`, each followed by its strength or by none;
    one file alone stays there. Errors: `UserError` for files that are not there."""
    if f"--{flag}" not in words:
        return []
    at = words.index(f"--{flag}")
    end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
    values = words[at + 1 : end]
    if len(values) < 2:
        return []
    del words[at:end]
    return with_strengths(values, flag)


def with_strengths(values: Sequence[str], flag: str) -> list[tuple[Path, float]]:
    """ "A 0.8 B" -> [(A, 0.8), (B, 1.0)]. Errors: `UserError`."""
    found: list[tuple[Path, float]] = []
    wrong, strong = [], True
    for value in values:
        path = Path(value).expanduser()
        number = None if path.exists() else _number(value)
        if number is None:
            if not path.is_file():
                wrong.append(f"--{flag}: no such file: {value}")
            found.append((path, 1.0))
        elif strong:
            wrong.append(f"--{flag} {value}: a strength stands after its file, as in `--{flag} a.safetensors 0.8`")
        else:
            found[-1] = found[-1][0], number
        strong = number is not None
    if wrong:
        raise UserError(*wrong)
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
