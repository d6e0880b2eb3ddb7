"""GGUF's blocks in torch against the package `gguf`."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch
from formats.gguf_files import packed
from gguf import GGMLQuantizationType

from sfumato.tensors.blocks import KINDS, Blocks


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_package(kind: str) -> None:
    of = GGMLQuantizationType[kind]
    assert KINDS[kind][:2] == gguf.GGML_QUANT_SIZES[of]
    data = packed(of, 6, 512 // KINDS[kind][0])
    parts = {"codes": torch.from_numpy(data)}
    found = Blocks(kind).dequantise(parts, (6, 512), torch.float32)
    assert torch.equal(found, torch.from_numpy(numpy.array(gguf.dequantize(data, of))))
    assert Blocks(kind).nbytes((6, 512)) == data.nbytes
    both = Blocks(kind).join([parts, parts])
    assert torch.equal(Blocks(kind).dequantise(both, (12, 512), torch.float32)[6:], found)
