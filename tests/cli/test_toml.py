from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.cli import toml
from sfumato.errors import UserError

TEXT = '''a = 1
# [no] table
[general]
text = """
[no.table]
k = 1
"""
list = [
  1, # one
  2,
]
b."quoted key" = "x # no comment"
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = 'a#b'
  [[datasets.subsets]]
  image_dir = "b"
[[datasets]]
  [[datasets.subsets]]
  image_dir = "c"
  inner = {q = 1}
'''


def test_every_key_has_its_line() -> None:
    assert toml.lines(TEXT) == {
        ("a",): 1, ("general",): 3, ("general", "text"): 4, ("general", "list"): 8, ("general", "b"): 12, ("general", "b", "quoted key"): 12,
        ("datasets", 0): 13, ("datasets", 0, "resolution"): 14,
        ("datasets", 0, "subsets", 0): 15, ("datasets", 0, "subsets", 0, "image_dir"): 16,
        ("datasets", 0, "subsets", 1): 17, ("datasets", 0, "subsets", 1, "image_dir"): 18,
        ("datasets", 1): 19, ("datasets", 1, "subsets", 0): 20, ("datasets", 1, "subsets", 0, "image_dir"): 21,
        ("datasets", 1, "subsets", 0, "inner"): 22, ("datasets", 1, "subsets", 0, "inner", "q"): 22,
    }  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_do_not_depend_on_line_ends(end: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf" + f"a = 1{end}{end}[t]{end}b = 2{end}".encode())
    assert toml.read(tmp_path / "x.toml") == ({"a": 1, "t": {"b": 2}}, {("a",): 1, ("t",): 3, ("t", "b"): 4})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.toml", 'ok = 1\ndir = "C:\\images"\n', "x.toml:2: is not TOML"),
        ("x.toml", 'ok = 1\ndir = "C:\\images"\n', "a backslash starts an escape"),
        ("x.toml", "a = \n", "x.toml:1: is not TOML"),
        ("x.toml", "a = [1,\n", "x.toml: is not TOML"),
        ("x.json", '{"a":\n oops}', "x.json:2: is not JSON"),
        ("x.json", "[]", "expected an object"),
    ],
)
def test_a_broken_file_is_told_with_its_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r".") as e:
        toml.read(tmp_path / name)
    assert message in str(e.value) and len(e.value.messages) == 1


def test_a_file_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes("a = 'ü'".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        toml.read(tmp_path / "x.toml")
