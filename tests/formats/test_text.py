"""Text files of users: whatever stands in them, a sentence or the content comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.cli import toml
from sfumato.errors import UserError
from sfumato.formats.text import parse_json, parse_toml, read_text
from sfumato.sampling.prompts import read_prompts
from sfumato.train import log

DEEP = {
    "lists.toml": "a = " + "[" * 3000 + "]" * 3000,
    "tables.toml": "a = " + "{a=" * 3000 + "1" + "}" * 3000,
    "key.toml": ".".join("a" * 2000) + " = 1",
    "header.toml": "[ " + ".".join("a" * 1000) + "]",
    "few.toml": "a = " + "[" * 60 + "]" * 60,
    "number.toml": "a = " + "1" * 5000,
    "lists.json": "[" * 100_000,
    "tables.json": '{"a":' * 60 + "1" + "}" * 60,
    "number.json": '{"a": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("name", DEEP)
def test_what_is_too_deep_for_a_parser_is_reported(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(DEEP[name], encoding="utf-8")
    for reader in (toml.read, read_prompts):
        with pytest.raises(UserError, match=f"{name}: is not (TOML|JSON)"):
            reader(tmp_path / name)


@given(st.text("ab.[]{}=,\"'\\\n 1#", max_size=80))
def test_any_text_is_content_or_a_sentence(text: str) -> None:
    for parse in (parse_toml, parse_json):
        try:
            parse("x", text)
        except UserError as e:
            assert len(e.messages) == 1 and e.messages[0].startswith("x")


@pytest.mark.parametrize("name", ["p.txt", "p.toml", "p.json"])
def test_a_byte_that_is_no_text_is_reported_with_its_place(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"a cat\xff\n")
    for reader in (toml.read, read_prompts):
        with pytest.raises(
            UserError, match=f"{name}: is not a text file in UTF-8 .invalid start byte at byte 5.; save it as UTF-8"
        ):
            reader(tmp_path / name)


def test_a_name_that_no_file_can_have_is_reported() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_text("a\0b")


def test_damaged_lines_of_a_log_cost_themselves_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    damaged = [
        b'{"step": 2, "loss": 0.\xff}',
        b"[" * 100_000,
        b"[]",
        b"7",
        b'{"step": "3"}',
        b'{"step": 1' + b"0" * 400 + b"}",
        b"\x00",
    ]
    path.write_bytes(
        b"\n".join([b'{"step": 1, "loss": 0.5}', *damaged, b'{"step": 4, "loss": 0.25, "note": "x"}', b'{"step": 9}'])
    )
    assert log.read(path)["loss"] == [(1, 0.5), (4, 0.25)]
    log.Lines(path, 4).close()
    assert [step for step, _ in log.read(path)["loss"]] == [1, 4] and len(
        path.read_text(encoding="utf-8").splitlines()
    ) == 2


def test_long_lists_are_parsed_once_for_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    loads = toml.tomllib.loads
    monkeypatch.setattr(toml.tomllib, "loads", lambda text: calls.append(1) or loads(text))
    assert toml.lines("a = [\n" + "1,\n" * 3000 + "]\nb = 1\n") == {("a",): 1, ("b",): 3003}
    assert len(calls) < 10
