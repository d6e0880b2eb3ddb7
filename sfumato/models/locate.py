"""Where a model is (a file, a folder or a hub id), and which of its files can be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfumato.errors import UserError

INDEX = ("model_index.json", "modular_model_index.json")
"""What a diffusers folder is known by: the list of its components, of a pipeline and of a modular one."""
WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""File names, without ending, of a component's weights in a diffusers folder."""
ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
"""Endings of those files, the best first."""
INDEXES = ("*.safetensors.index.json", "*.safetensors.index.fp16.json", "*.bin.index.json", "*.bin.index.fp16.json")
"""Files that list the shards of one, the best first."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PIPELINE_FILES = ("*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors")
"""What is downloaded of a model on the hub."""


def local(name: str, flag: str, patterns: Sequence[str] = PIPELINE_FILES) -> Path:
    """The file or folder `name`, or the hub's model of that name, downloaded. Errors: `UserError` naming `flag`."""
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name of thousands of characters, a home that is unknown
        raise UserError(
            f"{flag}: {name[:200]!r} cannot be looked for: {getattr(error, 'strerror', None) or error}"
        ) from None
    if there:
        return path
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{flag}: no such file or folder: {name[:200]!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{flag}: {name!r} is no file or folder here, and the hub has no such model or cannot be reached ({reason})"
        ) from error


def index_of(folder: Path) -> Path | None:
    """The list of a diffusers folder's components; None: it is none."""
    return next((path for name in INDEX if (path := folder / name).is_file()), None)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a component's weights: one, or the shards of one. Errors: `UserError` if there is none."""
    for ending in ENDINGS:
        for name in WEIGHTS:
            if (path := folder / f"{name}{ending}").is_file():
                return [path]
    for index in (path for pattern in INDEXES for path in sorted(folder.glob(pattern))):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index}: no list of shards (weight_map) is in it; download or copy it again")
        if odd := [
            shard for shard in shards.values() if not isinstance(shard, str) or not shard or Path(shard).name != shard
        ]:
            raise UserError(
                f"{index}: its list of shards (weight_map) names {odd[0]!r}, expected the name of a file beside it"
            )
        return sorted({folder / shard for shard in shards.values()})
    raise UserError(
        f"{folder}: no weights in it; expected {' or '.join(name + '.safetensors' for name in WEIGHTS[:2])}"
    )


QUANTISED = {
    "nf4 of bitsandbytes": r".*\.quant_state\.bitsandbytes__nf4",
    "fp4 of bitsandbytes": r".*\.quant_state\.bitsandbytes__fp4",
    "4 bits of bitsandbytes": r".*\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state(\..*)?)",
    "int8 of bitsandbytes": r".*\.SCB",
    "SVDQuant of Nunchaku": r".*\.(wscales|wcscales|wtscale)",
    "GPTQ or AWQ": r".*\.(qweight|qzeros|scales)",
    "quanto": r".*\.weight\._(data|scale|shift)",
    "nvfp4 of ComfyUI": r".*\.weight_scale_2",
    "4 bits with scales of groups, as ComfyUI writes them": r".*\.weight_(s_rel|s_channel|codebook|zeros)",
    "8 bits or fewer with scales that mean something else (mxfp8, 4 bits), as ComfyUI writes them": (
        r"(.*\.)?scaled_fp8"
        r"|.*\.(scale_weight|scale_input|weight_scale(_\d+)?|input_scale|output_scale|comfy_quant)"
    ),
}
"""How weights are kept in fewer bits -> pattern of the tensors that stand beside them."""
_QUANTISED = {form: re.compile(pattern) for form, pattern in QUANTISED.items()}


def quantised(names: Iterable[str]) -> tuple[str, str]:
    """How the weights of a file are quantised and a tensor that shows it, by the first form that has one; ("", "")
    where they are not. Those that can be read are not looked for: their scales have no name here."""
    names = list(names)
    return next(
        ((form, name) for form, pattern in _QUANTISED.items() for name in names if pattern.fullmatch(name)), ("", "")
    )


def refuse_quantised(where: Path | str, names: Iterable[str] = ()) -> None:
    """Errors: `UserError` if a file is quantised in a form that is not read."""
    again = "take the file in fp16 or bf16 (plain fp8, ComfyUI's scaled fp8 and int8, and GGUF, are read as well)"
    form, found = quantised(names)
    if form:
        raise UserError(
            f"{where}: its weights are quantised (it has the tensor {found!r}): {form}, which cannot be read; {again}"
        )


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Around code that reads sizes off a file's tensors and configs, which may be of any shape.

    What it raises where they are not as such a model has them becomes a `UserError`; `what` begins its message.
    """
    try:
        yield
    except KeyError as missing:
        raise UserError(f"{what} lacks the tensor {missing}: the file is incomplete or of another kind") from missing
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{what}: its tensors or its config are not those of a model of this kind ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file. Errors: `UserError` when it is missing or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object was expected")
    return content
