"""Entries are whole or absent; the index says what changed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch

from sfumato.data.store import Index, Store, key, why, writing
from sfumato.errors import UserError


@pytest.fixture(params=["memory", "disk"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "disk" else None


def test_what_is_put_is_got(root: Path | None) -> None:
    store, name = Store(root), key({"a": 1})
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


def test_a_damaged_entry_is_removed_so_that_it_is_made_again(tmp_path: Path) -> None:
    store, name = Store(tmp_path), key({})
    store.put(name, {"x": torch.zeros(9)})
    data = store.path(name).read_bytes()
    store.path(name).write_bytes(data[:-7])
    assert store.get(name) is None
    assert name not in store


def test_nothing_but_entries_is_left_on_the_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with writing(store, ahead=2) as put:
        for i in range(20):
            put(key({"i": i}), {"x": torch.full((3,), float(i))})
    assert all(torch.equal((store.get(key({"i": i})) or {})["x"], torch.full((3,), float(i))) for i in range(20))
    assert sorted(p.stem for p in tmp_path.rglob("*") if p.is_file()) == sorted(key({"i": i}) for i in range(20))


def test_an_entry_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "entries").write_text("a file where a folder should be")
    with pytest.raises((UserError, OSError)), writing(Store(tmp_path)) as put:
        put(key({}), {"x": torch.zeros(1)})


def test_the_index_remembers(root: Path | None) -> None:
    index = Index(root)
    index.write("picture", {"a": {"w": 1}, "b": [1, 2]})
    index.write("picture", {"a": {"w": 2}})
    index.write("texts", {"a": 3})
    again = Index(root) if root else index
    assert again.read("picture", ["a", "b", "c"]) == {"a": {"w": 2}, "b": [1, 2]}
    assert again.read("texts", ["a", "b"]) == {"a": 3}


def test_a_damaged_index_is_told(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match=r"index\.sqlite.*delete it"):
        Index(tmp_path).read("picture", ["a"])


def test_the_index_waits_for_another_run(tmp_path: Path) -> None:
    index = Index(tmp_path)
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
        ({"bucket": [512, 512], "crop": [0, 1]}, {"bucket": [448, 576], "crop": [0, 0]}, "bucket 512x512 -> 448x576"),
        ({"picture": "x", "dtype": "float16"}, {"picture": "y", "dtype": "bfloat16"}, "picture changed, dtype float16 -> bfloat16"),
    ],
)
def test_reasons(old: dict[str, object] | None, new: dict[str, object], reason: str) -> None:
    assert why(old, new) == reason
