"""Tensors that are made when they are written, against the safetensors library and the key tables' own results."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sfumato.formats import files
from sfumato.formats.lazy import Lazy
from sfumato.formats.names import SWAP_HALVES, KeyMap, rule
from sfumato.formats.planned import PlannedTensor, renamed

KEYS = KeyMap(
    rule("blocks.{i}.qkv", "b.{i}.q", "b.{i}.k", "b.{i}.v"),
    rule("norm", "norm_out", change=SWAP_HALVES),
    rule("out", "proj"),
)


def native() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"blocks.0.qkv.weight": (6, 4), "blocks.1.qkv.weight": (9, 4), "norm.bias": (4,), "out.weight": (2, 3)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return tensors | {"out.bias": tensors["norm.bias"].to(torch.float8_e4m3fn), "norm.weight": torch.arange(4)}


def planned(tensors: dict[str, Tensor], made: list[str]) -> dict[str, PlannedTensor]:
    def make(name: str) -> Tensor:
        made.append(name)
        return tensors[name]

    return {n: PlannedTensor(t.dtype, tuple(t.shape), lambda n=n: make(n)) for n, t in tensors.items()}


def test_a_planned_file_has_the_librarys_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    files.save(tmp_path / "a.safetensors", planned(native(), []), {"k": "v"}, progress=lambda *at: seen.append(at))
    assert (tmp_path / "a.safetensors").read_bytes() == safetensors.torch.save(native(), {"k": "v"})
    assert seen[-1] == (sum(t.nbytes for t in native().values()),) * 2
    files.save(tmp_path / "a.pt", planned(native(), []))
    assert {name: t.dtype for name, t in torch.load(tmp_path / "a.pt").items()} == {
        name: t.dtype for name, t in native().items()
    }


def test_files_are_copied_in_their_own_formats(tmp_path: Path) -> None:
    files.save(tmp_path / "a.safetensors", native())
    files.save(tmp_path / "b.safetensors", Lazy.of([tmp_path / "a.safetensors"]).as_stored())
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_another_number_format_is_for_floats_alone() -> None:
    half = {name: t.to(torch.float16) for name, t in planned(native(), []).items()}
    assert {n: (t.dtype, t.nbytes) for n, t in half.items()} == {
        n: (t.dtype, t.nbytes) for n, t in ((n, half[n].make()) for n in half)
    }
    assert half["norm.weight"].dtype == torch.int64
    assert half["out.bias"].dtype == torch.float16


@pytest.mark.parametrize("foreign", [False, True])
def test_renaming_makes_what_the_key_table_makes_of_the_least(foreign: bool) -> None:
    tensors = KEYS.to_foreign(native()) if foreign else native()
    rename = KEYS.natives if foreign else KEYS.foreigns
    made: list[str] = []
    out = renamed(rename, planned(tensors, made))
    assert made == []
    expected = dict(rename(tensors))
    assert out.keys() == expected.keys()
    for name, t in expected.items():
        del made[:]
        own = out[name].make()
        assert own.dtype == out[name].dtype == t.dtype and out[name].shape == t.shape
        assert torch.equal(own.float(), t.float())
        assert len(made) == (3 if "qkv" in name else 1)


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    tensors = {
        str(i): PlannedTensor(torch.uint8, (1 << 20,), lambda: torch.frombuffer(bytearray(1 << 20), dtype=torch.uint8))
        for i in range(32)
    }
    tracemalloc.start()
    files.save(tmp_path / "a.safetensors", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_what_is_made_otherwise_than_planned_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="'a' was planned"):
        files.save(tmp_path / "a.safetensors", {"a": PlannedTensor(torch.float32, (2,), lambda: torch.zeros(3))})
    assert not list(tmp_path.iterdir())
