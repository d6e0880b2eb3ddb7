"""Files of weights in fewer bits, as other programs write them: comfy-kitchen's int8, kohya's fp8 with scales of parts of a row, GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from comfy_kitchen.tensor import TensorWiseINT8Layout
from formats import gguf_files
from torch import Tensor

from sfumato.formats.files import save

ROTATED, BLOCK = 16, 32


def gguf(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[Path, dict[str, Tensor]]:
    return folder / f"{name}.gguf", gguf_files.write(folder / f"{name}.gguf", tensors)


def int8(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[Path, dict[str, Tensor]]:
    """Rotated where the width allows, else with a scale of each row."""
    held, wide = dict(tensors), dict(tensors)
    for key, t in tensors.items():
        if t.ndim == 2 and "blocks" in key:
            turned = t.shape[1] % ROTATED == 0
            codes, params = TensorWiseINT8Layout.quantize(
                t.float(), per_channel=True, convrot=turned, convrot_groupsize=ROTATED
            )
            said = {"format": "int8_tensorwise", "convrot": turned, "convrot_groupsize": ROTATED}
            held |= {f"{key}{k}": v for k, v in TensorWiseINT8Layout.state_dict_tensors(codes, params).items()}
            held[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(
                list(json.dumps(said).encode()), dtype=torch.uint8
            )
            wide[key] = TensorWiseINT8Layout.dequantize(codes, params)
    save(folder / f"{name}.safetensors", held, {"_quantization_metadata": "{}"})
    return folder / f"{name}.safetensors", wide


def fp8(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[Path, dict[str, Tensor]]:
    """A scale for each 32 numbers of a row, where there are as many."""
    held, wide = dict(tensors), dict(tensors)
    for key, t in tensors.items():
        if t.ndim == 2 and "blocks" in key:
            parts = t.float().view(len(t), t.shape[1] // BLOCK if t.shape[1] % BLOCK == 0 else 1, -1)
            scale = parts.abs().amax(-1, keepdim=True) / 448
            codes = (parts / scale).to(torch.float8_e4m3fn)
            held |= {key: codes.view(t.shape), key.removesuffix("weight") + "scale_weight": scale}
            wide[key] = (codes.float() * scale).view(t.shape)
    save(folder / f"{name}.safetensors", held | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)})
    return folder / f"{name}.safetensors", wide


FORMS: dict[str, Callable[[Path, str, Mapping[str, Tensor]], tuple[Path, dict[str, Tensor]]]] = {
    "GGUF Q8_0": gguf, "int8 rotated": int8, "fp8 scaled": fp8,
}  # fmt: skip
"""How a file says it is -> (folder, name, tensors) -> the file, and what its weights are in fp32."""
