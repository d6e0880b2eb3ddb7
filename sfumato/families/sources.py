"""Where a model is: a file, a folder or a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError
from sfumato.formats import files

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""File names, without ending, of a component's weights in a diffusers folder."""
ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
"""Endings of those files, the best first."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PIPELINE_FILES = ("*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors")
"""What is downloaded of a model on the hub."""


def local(name: str, flag: str, patterns: Sequence[str] = PIPELINE_FILES) -> Path:
    """The file or folder `name`, or the hub's model of that name, downloaded. Errors: `UserError` naming `flag`."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{flag}: no such file or folder: {name!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{flag}: {name!r} is no file or folder here, and the hub has no such model or cannot be reached ({reason})"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a component's weights: one, or the shards of one. Errors: `UserError` if there is none."""
    for ending in ENDINGS:
        for name in WEIGHTS:
            if (path := folder / f"{name}{ending}").is_file():
                return [path]
    for index in sorted(folder.glob("*.index.json")):
        return sorted({folder / shard for shard in read_json(index)["weight_map"].values()})
    raise UserError(f"{folder}: no weights in it; expected {' or '.join(name + '.safetensors' for name in WEIGHTS[:2])}")


def weights(folder: Path) -> dict[str, Tensor]:
    """{name: tensor} of a component's folder, from all its shards."""
    return {name: t for path in weight_files(folder) for name, t in files.load(path).items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file. Errors: `UserError` when it is missing or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object was expected")
    return content
