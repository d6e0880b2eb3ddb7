"""GGUF files as the package `gguf` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType
from torch import Tensor


def write(path: Path, tensors: Mapping[str, Tensor], kind: str = "Q8_0", arch: str = "flux") -> dict[str, Tensor]:
    """Matrices in blocks of this type, but for those whose rows are no whole blocks (as city96's converter: fp16) and
    all else (fp32); what the package reads of them again, in fp32."""
    writer, wanted = gguf.GGUFWriter(path, arch), {}
    for name, tensor in tensors.items():
        t, kept = tensor.detach().float().numpy(), GGMLQuantizationType.F32
        if t.ndim > 1:
            kept = GGMLQuantizationType[
                kind if t.shape[-1] % gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0 else "F16"
            ]
        data = gguf.quantize(t, kept)
        writer.add_tensor(name, data, raw_dtype=kept)
        wanted[name] = torch.from_numpy(numpy.array(gguf.dequantize(data, kept))).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


def packed(kind: GGMLQuantizationType, rows: int, blocks: int) -> numpy.ndarray:
    """Random codes with scales that are numbers: of each two bytes the second has no exponent of infinity."""
    made = numpy.random.default_rng(int(kind)).integers(0, 256, (rows, blocks * gguf.GGML_QUANT_SIZES[kind][1]))
    made[:, 1::2] &= 0x3B
    made[:, 0::2] &= 0x3B
    return made.astype(numpy.uint8)
