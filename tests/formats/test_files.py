"""Weight files: the safetensors library and torch are the oracles."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import files


def some() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {f"layer.{i}.weight": torch.randn(3, 4, generator=g).to(d) for i, d in enumerate(dtypes)}
    whole = [
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ]
    tensors |= {f"steps.{i}": torch.arange(5).to(d) for i, d in enumerate(whole)}
    return tensors | {
        "scalar": torch.tensor(2.0),
        "none": torch.zeros(0, 4),
        "é": torch.zeros(2),
        "c": torch.zeros(2, dtype=torch.complex64),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        t.dtype == b[k].dtype and t.shape == b[k].shape and torch.equal(t, b[k]) for k, t in a.items()
    )


def test_the_bytes_are_the_safetensors_librarys(tmp_path: Path) -> None:
    files.save(tmp_path / "a.safetensors", some(), {"naïve": 'a "quoted" \n line'})
    assert (tmp_path / "a.safetensors").read_bytes() == safetensors.torch.save(some(), {"naïve": 'a "quoted" \n line'})


def test_other_programs_read_what_is_saved(tmp_path: Path) -> None:
    tensors = some()
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    tensors["shared"] = tensors["scalar"]
    files.save(tmp_path / "a.safetensors", tensors)
    assert same(safetensors.torch.load_file(tmp_path / "a.safetensors"), tensors)
    files.save(tmp_path / "a.ckpt", tensors)
    assert same(torch.load(tmp_path / "a.ckpt", weights_only=True), tensors)


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".pt"])
def test_round_trip(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    files.save(path, some(), {"k": "v"})
    assert same(files.load(path), some())
    header = files.read_header(path)
    assert {name: i.shape for name, i in header.tensors.items()} == {name: tuple(t.shape) for name, t in some().items()}
    assert header.tensors["layer.2.weight"].dtype == "BF16"
    assert header.metadata == ({"k": "v"} if ending == ".safetensors" else {})
    assert os.listdir(tmp_path) == [path.name]


def test_the_header_needs_no_torch(tmp_path: Path) -> None:
    files.save(tmp_path / "a.safetensors", some())
    code = "import sys; from sfumato.formats.files import read_header; read_header(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a.safetensors"]).returncode == 0


def _whole() -> bytes:
    return safetensors.torch.save(some())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"abc", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (_whole()[:-1], "truncated: .* bytes of tensors expected"),
        (_whole()[:100], "truncated: the header alone"),
        (_whole() + b"more", "damaged: 4 bytes follow"),
        (_whole().replace(b'"shape":[3,4]', b'"shape":[3,5]', 1), "damaged: the header's place"),
        ((12).to_bytes(8, "little") + b"[1, 2, 3, 4]", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04aaaaaaaaaaaaaaaa", "a pickled file; rename it to a.ckpt"),
    ],
)
def test_what_is_wrong_with_a_file_is_reported_once(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for read in (files.read_header, files.load):
        with pytest.raises(UserError, match=reason) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        files.load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        files.read_header(tmp_path)


# --- pickles ---


def test_state_dict_is_unwrapped_and_old_pickles_are_read(tmp_path: Path) -> None:
    tensors = {"a.b": torch.ones(2, 3), "c": torch.zeros(1)}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "new.ckpt")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"string_to_param": {"*": tensors["c"]}, "name": "x"}, tmp_path / "embedding.pt")
    assert same(files.load(tmp_path / "new.ckpt"), tensors)
    assert same(files.load(tmp_path / "old.ckpt"), tensors)
    assert same(files.load(tmp_path / "embedding.pt"), {"string_to_param.*": tensors["c"]})


def test_lightnings_callbacks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints of Stable Diffusion 1.4 hold a class of pytorch_lightning as a key."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"callbacks": {kind: {"best": kind()}}, "state_dict": {"a": torch.ones(2)}}, tmp_path / "a.ckpt")
    assert same(files.load(tmp_path / "a.ckpt"), {"a": torch.ones(2)})


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "a.ckpt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"a": Evil(tmp_path / "ran")}, protocol=2))
    for name in ("a.ckpt", "b.pt"):
        with pytest.raises(UserError, match=r"mkdir|plain tensors"):
            files.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_truncated_pickles(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:2000])
    (tmp_path / "b.ckpt").write_text("hello there")
    # The end of a ZIP in several files, on which `zipfile.is_zipfile` itself fails.
    (tmp_path / "d.ckpt").write_bytes(b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 3) + b"PK\x05\x06" + bytes(18))
    for name in ("a.ckpt", "b.ckpt", "d.ckpt"):
        with pytest.raises(UserError, match=r"truncated|plain tensors"):
            files.load(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match="holds no tensors"):
        files.load(tmp_path / "c.ckpt")


# --- atomic ---


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_full_disk_leaves_the_old_file_alone(tmp_path: Path, ending: str, small_disk: Any) -> None:
    path = tmp_path / f"a{ending}"
    files.save(path, {"a": torch.ones(4)})
    before = path.read_bytes()
    with (
        small_disk(10_000),
        pytest.raises(
            UserError, match=r"the disk is full: 400,000 bytes needed, [\d,]+ free; nothing was written"
        ) as error,
    ):
        files.save(path, {"a": torch.ones(100_000)})
    assert str(path) in str(error.value)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_enospc_is_known_however_it_is_wrapped() -> None:
    assert files.is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert files.is_full(safetensors.SafetensorError("I/O error: No space left on device (os error 28)"))
    try:
        try:
            raise OSError(errno.ENOSPC, "x")
        except OSError:
            raise RuntimeError("a writer of a library failed")  # noqa: B904
    except RuntimeError as error:
        assert files.is_full(error)
    assert not files.is_full(OSError(errno.ENOENT, "No such file"))
    assert not files.is_full(RuntimeError("os error 280"))


def test_write_text_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_text(tmp_path / "a.toml", "old")

    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(UserError, match="disk is full"):
        files.write_text(tmp_path / "a.toml", "new and longer")
    assert (tmp_path / "a.toml").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.toml"]


def test_an_exception_in_the_block_passes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.aside(tmp_path / "a.txt") as temp:
        temp.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        files.write_text(tmp_path / "file" / "a.txt", "x")


def test_a_killed_writer_leaves_the_old_file_and_its_rest_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    code = f"""
import os, signal
from sfumato.formats.files import aside
with aside({str(path)!r}) as temp:
    temp.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (rest,) = set(tmp_path.iterdir()) - {path}
    files.write_text(path, "newer")
    assert rest.exists(), "it may belong to a writer that lives"
    os.utime(rest, (0, 0))
    files.write_text(path, "newest")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "newest"


def test_files_get_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    files.save(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


# --- content ---


def test_check_finite_names_the_tensors() -> None:
    files.check_finite(some(), "the adapter")
    files.check_finite({"large": torch.full((8,), 3e38), "none": torch.zeros(0)}, "whose sum is not finite")
    bad = {f"t{i}": torch.tensor([1.0, float("nan")], dtype=torch.float16) for i in range(5)}
    with pytest.raises(UserError, match=r"the adapter: .* t0 \(1 of 2 values\), t1 .*, t2 .* and 2 more"):
        files.check_finite(some() | bad, "the adapter")
    with pytest.raises(UserError, match="eight"):
        files.check_finite({"eight": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, "x")


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    tensors = some()
    files.save(tmp_path / "a.safetensors", tensors)
    assert files.fingerprint(dict(reversed(tensors.items()))) == files.fingerprint(
        files.load(tmp_path / "a.safetensors")
    )
    base = {"a": torch.zeros(2, 3), "b": torch.zeros(6)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.zeros(6)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(6)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(6, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([0, 0, 0, 0, 0, 1e-30])},
        {"a": torch.zeros(2, 3)},
    ]
    assert len({files.fingerprint(t) for t in [base, *others]}) == 6
    assert files.fingerprint({"a": torch.arange(6).reshape(2, 3).T}) == files.fingerprint(
        {"a": torch.arange(6).reshape(2, 3).T.contiguous()}
    )


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_changing_what_was_loaded_does_not_change_the_file(tmp_path: Path) -> None:
    for ending in (".safetensors", ".ckpt"):
        path = tmp_path / f"a{ending}"
        files.save(path, {"a": torch.ones(1000)})
        before = path.read_bytes()
        files.load(path)["a"].mul_(2)
        assert path.read_bytes() == before
