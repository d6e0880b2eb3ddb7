"""GGUF against the package `gguf`, which writes the files and says what their numbers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType

from formats.gguf_files import packed, write
from sfumato.errors import UserError
from sfumato.formats.files import load, read_header
from sfumato.formats.gguf import is_block
from sfumato.formats.lazy import Lazy
from sfumato.memory.tracker import Tracker

PLAIN = ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64")
KINDS = [kind for kind in GGMLQuantizationType if is_block(kind.name)]


def test_all_types_that_the_package_reads_are_read(tmp_path: Path) -> None:
    """Piece by piece, as the package reads them whole."""
    assert {"Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q2_K"} <= {kind.name for kind in KINDS}
    path, wanted = tmp_path / "a.gguf", {}
    writer = gguf.GGUFWriter(path, "flux")
    for kind in KINDS:
        numbers = gguf.GGML_QUANT_SIZES[kind][0]
        data = packed(kind, 300, 512 // numbers)  # more than a piece
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        wanted[kind.name] = torch.from_numpy(gguf.dequantize(data, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lazy = Lazy.of([path])
    assert lazy.shapes == dict.fromkeys(wanted, (300, 512))
    assert {of.form for of in lazy.coded.values()} == {f"GGUF {kind.name}" for kind in KINDS}
    for name, exact in lazy.cast(torch.float32).items():
        assert torch.equal(exact, wanted[name]) and exact.isfinite().all()
    assert all(torch.equal(t, wanted[name].bfloat16()) for name, t in lazy.items())


def test_plain_numbers_and_shapes_are_as_they_were(tmp_path: Path) -> None:
    """bf16 and fp16 as they stand; sizes outermost first; what was laid out anew in rows of 256 as before."""
    path, g = tmp_path / "a.gguf", numpy.random.default_rng(0)
    half, conv = g.standard_normal((6, 5), numpy.float32).astype(numpy.float16), g.standard_normal((32, 8, 3, 3))
    rows = gguf.quantize(conv.astype(numpy.float32).reshape(-1, 256), GGMLQuantizationType.Q8_0)
    bf16 = gguf.quantize(half.astype(numpy.float32), GGMLQuantizationType.BF16)
    writer = gguf.GGUFWriter(path, "sdxl")
    writer.add_array("comfy.gguf.orig_shape.conv", [32, 8, 3, 3])
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(50)])
    writer.add_tensor("half", half)
    writer.add_tensor("bf16", bf16, raw_dtype=GGMLQuantizationType.BF16)
    writer.add_tensor("conv", rows, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lazy = Lazy.of([path])
    assert lazy["half"].dtype == torch.float16 and torch.equal(lazy["half"], torch.from_numpy(half))
    assert lazy["bf16"].dtype == torch.bfloat16 and torch.equal(lazy["bf16"], torch.from_numpy(half).bfloat16())
    wanted = torch.from_numpy(gguf.dequantize(rows, GGMLQuantizationType.Q8_0)).view(32, 8, 3, 3)
    assert torch.equal(lazy.cast(torch.float32)["conv"], wanted)
    assert read_header(path).metadata == {"general.architecture": "sdxl"}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    wanted = write(tmp_path / "a.gguf", {"w": torch.randn(4, 64)})
    assert torch.equal(Lazy.of([tmp_path / "a.gguf"]).cast(torch.float32)["w"], wanted["w"])
    with pytest.raises(UserError, match="a GGUF file, which is read as a base model"):
        load(tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[:-40])
    with pytest.raises(UserError, match="truncated"):
        Lazy.of([tmp_path / "a.gguf"])
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "flux")
    writer.add_tensor("w", numpy.zeros((2, 292), numpy.uint8), raw_dtype=GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"'w' \(Q8_K\)"):
        Lazy.of([tmp_path / "b.gguf"])


@pytest.mark.parametrize(
    ("facts", "wrong"),
    [
        (lambda writer: writer.add_uint32("general.alignment", 7), "general.alignment is 7, not a power of 2"),
        (lambda writer: writer.add_float32("general.alignment", 32.5), "general.alignment is 32.5, not"),
        (lambda writer: writer.add_string("general.alignment", "x"), "general.alignment is x, not"),
        (lambda writer: setattr(writer, "endianess", gguf.GGUFEndian.BIG), "a GGUF file for big-endian machines"),
    ],
)
def test_files_whose_numbers_would_be_read_from_elsewhere(tmp_path: Path, facts: Any, wrong: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    facts(writer)
    writer.add_tensor("w", numpy.zeros((2, 64), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=wrong):
        Lazy.of([tmp_path / "a.gguf"])


def test_no_second_copy_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", {"w": torch.randn(2048, 1024)})
    lazy = Lazy.of([tmp_path / "a.gguf"])
    with Tracker() as codes:
        assert lazy.codes("w")[0].nbytes == 2048 * 1024 // 32 * 34 == codes.peak
    with Tracker() as wide:
        assert lazy["w"].nbytes == 2048 * 1024 * 2 >= wide.peak - (1 << 20)
