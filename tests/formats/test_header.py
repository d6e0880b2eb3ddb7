"""A header that training could not load is refused when it is read, with the tensor's name and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.errors import UserError
from sfumato.formats import files

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def written(path: Path, header: bytes | dict[str, Any], size: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


def test_a_good_header_is_read(tmp_path: Path) -> None:
    found = files.read_header(written(tmp_path / "a.safetensors", {"w": GOOD, "__metadata__": {"a": "b"}}))
    assert found.tensors["w"].shape == (2, 3) and found.metadata == {"a": "b"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": ["F32"]}, r"'w' has the dtype \['F32'\]; expected one of BOOL"),
        ({"dtype": "f32"}, "'w' has the dtype 'f32'; expected one of BOOL"),
        ({"dtype": None}, "'w' has the dtype None"),
        ({"shape": [2, None]}, r"'w' has the shape \[2, None\]; expected a list of whole numbers"),
        ({"shape": [2.0, 3]}, "'w' has the shape"),
        ({"shape": [-2, -3]}, "'w' has the shape"),
        ({"shape": [True, 6]}, "'w' has the shape"),
        ({"shape": {"0": 6}}, "'w' has the shape"),
        ({"shape": [2**70, 0]}, "'w' has the shape"),
        ({"shape": [2**30] * 3}, "which no file can hold"),
        ({"shape": [2, 4]}, "does not fit its shape"),
        ({"data_offsets": [0]}, "'w' has the data_offsets"),
        ({"data_offsets": [24, 0]}, "'w' has the data_offsets"),
        ({"data_offsets": [0.0, 24.0]}, "'w' has the data_offsets"),
        ({"data_offsets": [8, 32]}, "does not fit its shape"),
    ],
)
def test_an_odd_entry_names_its_tensor(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        files.read_header(written(tmp_path / "a.safetensors", {"w": {**GOOD, **entry}}))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b'{"w":' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
        (b'{"w":1', "not a table of tensors"),
        (b"[1]", "not a JSON object"),
        (b'{"w":' + b"9" * 5000 + b"}", "not a table of tensors"),
        (b'{"w":NaN}', "NaN is not a number"),
        (b'{"w":null}', "tensor 'w' is None"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', "not Unicode text"),
        (b'{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"w":1}', "'w' stands in it twice"),
        (
            b'{"__metadata__":{"step":3},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}',
            "the metadata 'step' is 3, expected text",
        ),
        (b'{"__metadata__":[],"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', "__metadata__ is"),
        ('{"w":1}'.encode("utf-16"), "not a table of tensors"),
    ],
    ids=range(12),
)
def test_a_text_that_is_no_header(tmp_path: Path, header: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        files.read_header(written(tmp_path / "a.safetensors", header))


def test_tensors_that_lie_over_one_another(tmp_path: Path) -> None:
    header = {"a": GOOD, "b": {**GOOD, "data_offsets": [12, 36]}}
    with pytest.raises(UserError, match="'b' does not fit"):
        files.read_header(written(tmp_path / "a.safetensors", header, 36))


def test_a_format_that_is_not_known_is_shown_and_not_loaded(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"w": {"dtype": "F4", "shape": [48], "data_offsets": [0, 24]}})
    assert files.read_header(path).tensors["w"].dtype == "F4"
    with pytest.raises(UserError, match=r"'w' \(F4\)"):
        files.load(path)


@pytest.mark.parametrize(
    "content", [{"a": {"b": torch.eye(3).to_sparse()}}, {"": torch.eye(3).to_sparse()}], ids=["sparse", "no name"]
)
def test_pickled_tensors_that_are_no_plain_numbers(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="sparse"):
        files.read_header(tmp_path / "a.pt")
