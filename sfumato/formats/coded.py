"""Weights that stand in codes in a file, and the tensors that belong to them: fp8 and int8 with scales, as ComfyUI and
kohya's scripts write them, and the blocks of GGUF. Imports no torch, unless values are read.

`X.weight` in fp8 or int8 goes with `X.scale_weight` (or `X.weight_scale`), by which it is multiplied: one number for
all of it, one for each row, or (rows, n, 1), one for each of n parts of a row. `scaled_fp8` marks a file in fp8, and
`X.scale_input` and the like are for kernels that multiply in fp8. What int8 means, `X.comfy_quant` says, a JSON object
in bytes, or the file's metadata: rows may be rotated (QUANTIZATION.md and comfy/ops.py of ComfyUI).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.formats import gguf
from sfumato.formats.header import Header, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2")
"""Formats that nothing is computed in; bf16 holds their values exactly."""
MARK = "scaled_fp8"
SCALES = ("scale_weight", "weight_scale")
METADATA = "_quantization_metadata"
"""The key of a file's metadata that says of all layers what `comfy_quant` says of one."""
_QUANT = "comfy_quant"
_COMPANIONS = (*SCALES, "scale_input", "input_scale", _QUANT)
_GROUPS = (4, 16, 64, 256, 1024)
"""Sizes of the groups that files have."""
_GGUF = "GGUF "
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class Coded:
    """How a weight stands in a file."""

    form: str
    """ "fp8 scaled", "int8 scaled", "int8 rotated", "GGUF Q4_K" ..."""
    unit: int
    """Numbers that are read together: those of a row, or of a block."""
    scale: str = ""
    """The tensor that scales it; "": the codes say all."""
    group: int = 0
    """Columns that were rotated together; 0: it was not rotated."""

    @property
    def block(self) -> str:
        """GGUF's type of it; "": it is no block of GGUF."""
        return self.form.removeprefix(_GGUF) if self.form.startswith(_GGUF) else ""


def find(path: Path, header: Header) -> dict[str, Coded]:
    """The weights of a file that stand in codes and can be read, by name."""
    layers, found = _layers(header.metadata), dict[str, Coded]()
    for name, info in header.tensors.items():
        layer, columns = name.removesuffix(".weight"), math.prod(info.shape[1:])
        if gguf.is_block(info.dtype):
            found[name] = Coded(_GGUF + info.dtype, gguf.block(info.dtype)[0])
        if layer == name or not info.shape or not (scale := _scale(header.tensors, f"{layer}.", info.shape)):
            continue
        if info.dtype in FP8:
            found[name] = Coded("fp8 scaled", columns, scale)
        if info.dtype == "I8":
            group = _rotation(layers.get(layer) or _marked(path, header, layer), info.shape)
            if group is not None:
                found[name] = Coded("int8 rotated" if group else "int8 scaled", columns, scale, group)
    return found


def companions(tensors: Mapping[str, TensorInfo], coded: Mapping[str, Coded]) -> set[str]:
    """Tensors that are no weights, but belong to those that stand in codes."""
    scaled = {name: of for name, of in coded.items() if of.scale}
    each = {name.removesuffix("weight") + companion for name in scaled for companion in _COMPANIONS}
    marks = {name for name in tensors if name.split(".")[-1] == MARK} if scaled else set()
    return {name for name in tensors if name in each} | marks


def decoded(codes: Tensor, of: Coded, scale: Tensor | None) -> Tensor:
    """(n, codes of a unit) and what scales these n, (n, parts) fp32 -> (n, unit) fp32."""
    import torch

    from sfumato.tensors.stored import turned, widened

    if scale is None:
        return gguf.dequantised(of.block, codes)
    values = (widened(codes, torch.float32).view(len(codes), scale.shape[1], -1) * scale[..., None]).view(
        len(codes), -1
    )
    return turned(values, of.group)


def by_rows(scale: Tensor, rows: int) -> Tensor:
    """(rows, parts) fp32 of a scale in any of its shapes; parts of a row are of one size."""
    return scale.float().reshape(1, 1).expand(rows, 1) if scale.numel() == 1 else scale.float().reshape(rows, -1)


def _scale(tensors: Mapping[str, TensorInfo], path: str, shape: tuple[int, ...]) -> str:
    """The name of a scale whose shape fits."""
    name = next((path + each for each in SCALES if path + each in tensors), "")
    if not name or tensors[name].dtype not in _FLOATS:
        return ""
    of, columns = tensors[name].shape, math.prod(shape[1:])
    parts = len(of) == 3 and of[0] == shape[0] and of[2] == 1 and of[1] > 0 and columns % of[1] == 0
    return name if parts or math.prod(of) in (1, shape[0]) else ""


def _layers(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata say of the formats of layers."""
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        return dict(json.loads(metadata[METADATA])["layers"])
    return {}


def _marked(path: Path, header: Header, layer: str) -> Any:
    """What stands beside a layer of its format."""
    info = header.tensors.get(f"{layer}.{_QUANT}")
    with suppress(ValueError, OSError, RecursionError):
        if info is not None:
            with path.open("rb") as file:
                file.seek(header.size + info.start)
                return json.loads(file.read(info.end - info.start))
    return {}


def _rotation(said: Any, shape: tuple[int, ...]) -> int | None:
    """Columns of a weight in int8 that were rotated together; None: its bytes mean something else."""
    said = said if isinstance(said, dict) else {"format": said}
    if said.get("format") != "int8_tensorwise":
        return None
    more = said.get("params")
    said = {**(more if isinstance(more, dict) else {}), **said}
    if not said.get("convrot"):
        return 0
    group = said.get("convrot_groupsize", 256)
    return group if group in _GROUPS and len(shape) == 2 and shape[1] % group == 0 else None
