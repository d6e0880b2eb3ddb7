"""Tensors that stay in their files, against torch's and safetensors' own readers."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.lazy import Lazy

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]
ENDINGS = [".safetensors", ".pt"]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """Kind, shape and every bit; `torch.equal` does not know all kinds."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert bits(got) == bits(wanted)


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if dtype in (*FLOATS, *FP8):
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def kinds() -> dict[str, Tensor]:
    """A matrix, a scalar and an empty tensor of each kind, and one that ends where no number of 8 bytes may."""
    made: dict[str, Tensor] = {"odd": torch.arange(3, dtype=torch.uint8)}
    for dtype in [*FLOATS, *FP8, *WHOLE, torch.complex64]:
        name = str(dtype).removeprefix("torch.")
        made |= {
            f"{name}.matrix": random(dtype, 3, 5),
            f"{name}.scalar": random(dtype),
            f"{name}.empty": random(dtype, 0, 4),
        }
    return made


def written(path: Path, tensors: dict[str, Tensor]) -> Path:
    """As others write them."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    return path


def theirs(path: Path) -> dict[str, Tensor]:
    """As others read them."""
    found: dict[str, Tensor] = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
    )
    return found


def rewrite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Other values in the same place."""
    (path.parent / "new").mkdir()
    new = written(path.parent / "new" / path.name, tensors).read_bytes()  # a pickle holds its own name
    assert len(new) == path.stat().st_size
    with path.open("r+b") as file:
        file.write(new)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("map", [True, False])
def test_tensors_of_all_kinds_equal_torchs(tmp_path: Path, ending: str, map: bool) -> None:
    path = written(tmp_path / f"model{ending}", kinds())
    lazy, wanted = Lazy.of([path]).cast(None, map=map), theirs(path)
    assert lazy.keys() == wanted.keys() == kinds().keys()
    assert lazy.shapes == {name: tuple(t.shape) for name, t in wanted.items()}
    for name, t in wanted.items():
        assert_same(lazy[name], t.bfloat16() if t.dtype in FP8 else t)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_cast_and_nothing_else(tmp_path: Path, ending: str, dtype: torch.dtype) -> None:
    path = written(tmp_path / f"model{ending}", kinds())
    lazy = Lazy.of([path]).cast(dtype)
    for name, t in theirs(path).items():
        assert_same(lazy[name], t.to(dtype) if t.is_floating_point() else t)


@pytest.mark.parametrize("piece", [1, 4, 15, 16])
def test_a_tensor_is_cast_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("sfumato.formats.lazy.PIECE", piece)
    path = written(tmp_path / "model.safetensors", kinds())
    lazy = Lazy.of([path]).cast(torch.float32)
    for name, t in kinds().items():
        assert_same(lazy[name], t.float() if t.is_floating_point() else t)


@pytest.mark.parametrize("dtype", FP8)
def test_bf16_holds_every_value_of_fp8(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    lazy = Lazy.of([written(tmp_path / "model.safetensors", {"a": every})])
    assert lazy["a"].dtype == torch.bfloat16
    torch.testing.assert_close(lazy["a"].float(), every.float(), rtol=0, atol=0, equal_nan=True)
    assert_same(lazy.cast(torch.float16)["a"].nan_to_num(), every.half().nan_to_num())


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_wanted_as_it_stands_is_mapped_and_what_is_copied_is_not(tmp_path: Path, ending: str) -> None:
    """A mapped tensor is the file: it shows what is written there afterwards."""
    path = written(tmp_path / f"model{ending}", {"a": torch.zeros(64, 64)})
    lazy = Lazy.of([path])
    mapped = [lazy["a"], lazy.cast(torch.float32)["a"]]
    copied = [lazy.cast(None, map=False)["a"], lazy.cast(torch.float32, map=False)["a"], lazy.cast(torch.float16)["a"]]
    rewrite(path, {"a": torch.ones(64, 64)})
    assert {t.unique().item() for t in mapped} == {1.0}
    assert {t.unique().item() for t in copied} == {0.0}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("map", [True, False])
def test_what_is_done_to_a_tensor_never_reaches_the_file(tmp_path: Path, ending: str, map: bool) -> None:
    path = written(tmp_path / f"model{ending}", {"a": torch.ones(64, 64)})
    before = path.read_bytes()
    Lazy.of([path]).cast(None, map=map)["a"].mul_(2)
    assert path.read_bytes() == before


def touched(path: Path) -> None:
    """A time of change that is surely another one; clocks of file systems are coarse."""
    then = path.stat()
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns + 10**9))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("map", [True, False])
def test_a_file_that_changes_after_it_was_opened_is_refused_not_mixed(
    tmp_path: Path, ending: str, dtype: torch.dtype | None, map: bool
) -> None:
    path = written(tmp_path / f"model{ending}", {"a": torch.zeros(64, 64), "b": torch.zeros(64, 64)})
    lazy = Lazy.of([path]).cast(dtype, map=map)
    assert lazy["a"].unique().item() == 0.0
    rewrite(path, {"a": torch.ones(64, 64), "b": torch.ones(64, 64)})
    touched(path)
    for read in (lambda: lazy["b"], lazy.check):
        with pytest.raises(UserError, match=rf"model\{ending}: changed while it was in use"):
            read()


def test_a_file_rewritten_with_its_time_set_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "model.safetensors", {"a": torch.zeros(64, 64)})
    lazy, then = Lazy.of([path]), path.stat()
    file = next(iter(lazy.places.values()))[0]
    rewrite(path, {"a": torch.ones(64, 64)})
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    # As a file system says that has such a time, with a clock that is not coarse.
    monkeypatch.setattr(
        file, "_opened", SimpleNamespace(**{n: getattr(then, n) for n in ("st_size", "st_mtime_ns")}, st_ctime_ns=1)
    )
    with pytest.raises(UserError, match="changed while it was in use"):
        lazy["a"]


@pytest.mark.skipif(os.name == "nt", reason="an open file keeps its name there")
@pytest.mark.parametrize("map", [True, False])
def test_a_file_that_was_renamed_or_replaced_is_still_the_one_that_was_opened(
    tmp_path: Path, map: bool, caplog: Any
) -> None:
    path = written(tmp_path / "model.safetensors", {"a": torch.zeros(8, 8), "b": torch.zeros(8, 8)})
    lazy = Lazy.of([path]).cast(None, map=map)
    path.rename(tmp_path / "moved.safetensors")
    assert lazy["a"].unique().item() == 0.0
    assert not caplog.text
    assert not lazy.in_place()
    written(path, {"a": torch.ones(8, 8), "b": torch.ones(8, 8)})
    lazy.check()
    assert lazy["b"].unique().item() == 0.0
    assert caplog.text.count("another file stands there now") == 1


def test_shards_are_one(tmp_path: Path) -> None:
    """Pickled shards and others may stand side by side."""
    first = written(tmp_path / "1.safetensors", {"a": torch.ones(2), "b": torch.zeros(3)})
    second = written(tmp_path / "2.bin", {"c": torch.arange(4)})
    lazy = Lazy.of([first, second])
    assert lazy.paths == [first, second]
    assert lazy.shapes == {"a": (2,), "b": (3,), "c": (4,)}
    assert {name: t.tolist() for name, t in lazy.items()} == {"a": [1.0, 1.0], "b": [0.0] * 3, "c": [0, 1, 2, 3]}
    assert lazy.only(lambda name: name == "c").paths == [second]


def test_parts_of_it_keep_how_it_is_read(tmp_path: Path) -> None:
    names = ("net.a.weight", "net.b.weight", "network.weight", "vae.a.weight")
    path = written(tmp_path / "model.safetensors", {name: torch.full((2,), float(i)) for i, name in enumerate(names)})
    half = Lazy.of([path]).cast(torch.float16, map=False)
    below = half.below("net.")
    assert list(below) == ["a.weight", "b.weight"]
    assert below.only(lambda name: name.startswith("b")).shapes == {"b.weight": (2,)}
    assert below.below("b.")["weight"].tolist() == [1.0, 1.0]
    assert {t.dtype for t in [*below.values(), *half.only(lambda _: True).values()]} == {torch.float16}
    assert list(half.below("")) == list(half)
    with pytest.raises(KeyError):
        below["vae.a.weight"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_truncated_file_is_reported_when_it_is_opened(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"model{ending}", {"a": torch.ones(4000)})
    os.truncate(path, path.stat().st_size - 8000)
    with pytest.raises(UserError, match=rf"model\{ending}: truncated"):
        Lazy.of([path])


@pytest.mark.parametrize("map", [True, False])
def test_a_file_that_was_cut_after_it_was_opened_is_reported_and_no_page_of_it_is_touched(
    tmp_path: Path, map: bool
) -> None:
    path = written(tmp_path / "model.safetensors", {"a": torch.ones(4), "b": torch.ones(4000)})
    lazy = Lazy.of([path]).cast(None, map=map)
    os.truncate(path, path.stat().st_size - 8000)
    for name in lazy:
        with pytest.raises(UserError, match=r"model\.safetensors: changed while it was in use"):
            lazy[name]


def test_what_is_no_weight_file_is_reported_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "code.ckpt").write_bytes(pickle.dumps({"a": os.getcwd}))
    with pytest.raises(UserError, match=r"code\.ckpt"):
        Lazy.of([tmp_path / "code.ckpt"])
    with pytest.raises(UserError, match="no such file"):
        Lazy.of([tmp_path / "nothing.safetensors"])


def test_a_header_of_odd_length_is_read(tmp_path: Path) -> None:
    """Other programs do not pad it, so that numbers stand where no number of their size may."""
    path = written(tmp_path / "model.safetensors", {"a": torch.arange(6, dtype=torch.float32)})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert files.read_header(path).size % 2 == 1
    for map in (True, False):
        assert Lazy.of([path]).cast(None, map=map)["a"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
