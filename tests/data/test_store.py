"""Entries are whole or absent; the index says what changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.data.entries import Damaged, facts, unpack
from sfumato.data.store import FileIndex, TensorStore, key, trust, unusable, why, writing
from sfumato.errors import UserError
from sfumato.formats.files import serialise


@pytest.fixture(params=["memory", "disk"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "disk" else None


def test_what_is_put_is_got(root: Path | None) -> None:
    store, name = TensorStore(root), key({"a": 1})
    assert name not in store
    assert store.get(name) is None
    kept = {"latents": torch.randn(4, 3, 2).half(), "mask": torch.ones(1, 3, 2), "ids": torch.arange(5)[::2]}
    store.put(name, kept)
    assert name in store
    got = store.get(name) or {}
    assert got.keys() == kept.keys()
    assert all(torch.equal(got[k], kept[k]) and got[k].dtype == kept[k].dtype for k in kept)


def test_keys_depend_on_every_part_and_not_on_their_order() -> None:
    assert key({"a": 1, "b": [2, 3]}) == key({"b": [2, 3], "a": 1})
    assert len({key(p) for p in ({"a": 1}, {"a": "1"}, {"b": 1}, {"a": 1, "b": None}, {"a": [1]})}) == 5


def damage(store: TensorStore, name: str, how: str) -> None:
    """Change the file of an entry, or put another in its place."""
    path = store.path(name)
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[-7:]
    elif how == "empty":
        data.clear()
    elif how == "zeros":
        data[-20:] = bytes(20)
    elif how == "all zeros":
        data[:] = bytes(len(data))
    elif how == "one bit":
        data[-9] ^= 4
    elif how == "another dtype":
        data = bytearray(bytes(data).replace(b'"F16"', b'"I16"'))
    elif how == "another shape":
        data = bytearray(bytes(data).replace(b"[4,3,2]", b"[2,3,4]"))
    elif how == "another's":
        other = key({"another": 1})
        store.put(other, {"latents": torch.ones(4, 3, 2).half()})
        data = bytearray(store.path(other).read_bytes())
    elif how == "made by another program":
        data = bytearray(b"".join(serialise({"latents": torch.full((4, 3, 2), float("nan")).half()})))
    elif how == "deep":
        data = bytearray((10**5).to_bytes(8, "little") + b"[" * 10**5)
    path.write_bytes(bytes(data))


DAMAGES = [
    "truncated",
    "empty",
    "zeros",
    "all zeros",
    "one bit",
    "another dtype",
    "another shape",
    "another's",
    "made by another program",
    "deep",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_entry_is_found_when_read_and_removed_so_that_it_is_made_again(tmp_path: Path, how: str) -> None:
    store, name = TensorStore(tmp_path), key({})
    store.put(name, {"latents": torch.randn(4, 3, 2).half()})
    damage(store, name, how)
    with pytest.raises(Damaged, match="that of another" if how == "another's" else "damaged"):
        store.get(name)
    assert name not in store


def test_an_entry_that_is_not_finite_is_found(tmp_path: Path) -> None:
    store, name = TensorStore(tmp_path), key({})
    for bad in (float("nan"), float("inf")):
        store.put(name, {"latents": torch.tensor([1.0, bad, 2.0])})
        with pytest.raises(Damaged, match="not finite"):
            store.get(name)


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_no_flipped_bits_go_unnoticed(data: st.DataObject) -> None:
    kept = {"latents": torch.arange(24.0).view(4, 3, 2).half(), "ids": torch.arange(3)}
    whole = b"".join(serialise(kept, facts("name", kept)))
    flipped = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        flipped[place] ^= data.draw(st.integers(1, 255))
    try:
        read = unpack("name", bytes(flipped))
    except Damaged:
        return
    # What is left is a change that says nothing, such as a blank of the header.
    assert read.keys() == kept.keys()
    assert all(torch.equal(read[k], kept[k]) and read[k].dtype == kept[k].dtype for k in kept)


def test_entries_are_verified_once_and_again_when_their_file_changes(tmp_path: Path) -> None:
    store, index, read = TensorStore(tmp_path), FileIndex(tmp_path), []
    names = [key({"i": i}) for i in range(4)]
    for name in names[:3]:
        store.put(name, {"x": torch.zeros(3)})

    def mismatch(name: str, entry: Mapping[str, Tensor]) -> str:
        read.append(name)
        return "" if entry["x"].shape == (3,) else "its entry is of another shape"

    def found() -> tuple[dict[str, str], set[str]]:
        read.clear()
        return unusable(store, index, names, mismatch), set(read)

    assert found() == ({names[3]: ""}, set(names[:3]))
    assert found() == ({names[3]: ""}, set())
    store.put(names[0], {"x": torch.zeros(4)})
    store.path(names[1]).write_bytes(b"")
    assert found() == (
        {names[3]: "", names[0]: "its entry is of another shape", names[1]: "its entry is damaged"},
        {names[0]},
    )
    store.put(names[0], {"x": torch.zeros(3)})
    trust(store, index, names)
    assert found() == ({names[3]: "", names[1]: ""}, set())


def test_nothing_but_entries_is_left_on_the_disk(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    with writing(store, ahead=2) as put:
        for i in range(20):
            put(key({"i": i}), {"x": torch.full((3,), float(i))})
    assert all(torch.equal((store.get(key({"i": i})) or {})["x"], torch.full((3,), float(i))) for i in range(20))
    assert sorted(p.stem for p in tmp_path.rglob("*") if p.is_file()) == sorted(key({"i": i}) for i in range(20))


def test_an_entry_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "entries").write_text("a file where a folder should be")
    with pytest.raises((UserError, OSError)), writing(TensorStore(tmp_path)) as put:
        put(key({}), {"x": torch.zeros(1)})


def test_the_index_remembers(root: Path | None) -> None:
    index = FileIndex(root)
    index.write("picture", {"a": {"w": 1}, "b": [1, 2]})
    index.write("picture", {"a": {"w": 2}})
    index.write("texts", {"a": 3})
    again = FileIndex(root) if root else index
    assert again.read("picture", ["a", "b", "c"]) == {"a": {"w": 2}, "b": [1, 2]}
    assert again.read("texts", ["a", "b"]) == {"a": 3}


def test_a_damaged_index_is_reported(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match=r"index\.sqlite.*delete it"):
        FileIndex(tmp_path).read("picture", ["a"])


def test_the_index_waits_for_another_run(tmp_path: Path) -> None:
    index = FileIndex(tmp_path)
    index.write("k", {"a": 1})
    other = sqlite3.connect(tmp_path / "index.sqlite")
    with other:
        other.execute("INSERT INTO known VALUES ('k', 'b', '2')")
    other.close()
    assert index.read("k", ["a", "b"]) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (None, {"a": 1}, "new"),
        ({"a": 1}, {"a": 1}, "its entry is gone"),
        ({"VAE": "x"}, {"VAE": "y"}, "VAE changed"),
        ({"template": "a\nb"}, {"template": "a\nc"}, "template changed"),
        ({"bucket": [512, 512], "crop": [0, 1]}, {"bucket": [448, 576], "crop": [0, 0]}, "bucket 512x512 -> 448x576"),
        (
            {"picture": "x", "dtype": "float16"},
            {"picture": "y", "dtype": "bfloat16"},
            "picture changed, dtype float16 -> bfloat16",
        ),
    ],
)
def test_reasons(old: dict[str, object] | None, new: dict[str, object], reason: str) -> None:
    assert why(old, new) == reason


@pytest.mark.parametrize("row", ["{", "", "\x00", "[" * 5000, b"\xff\xfe", 3.5, None])
def test_a_damaged_row_of_the_index_is_not_known(tmp_path: Path, row: object) -> None:
    index = FileIndex(tmp_path)
    index.write("k", {"a": 1, "b": 2})
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as other, other:
        other.execute("UPDATE known SET value = ? WHERE name = 'a'", (row,))
    assert index.read("k", ["a"]).get("a") in (None, 3.5)
    assert index.read("k", ["b"]) == {"b": 2}
    assert why(row, {"VAE": "x"}) == "new"  # type: ignore[arg-type]
