"""A result's name must be one on every system: files are trained on one and used on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.cli import flags
from sfumato.errors import UserError

LINE = ["--pretrained_model_name_or_path", "base.safetensors", "--dataset_config", "data.toml", "--output_name"]
REFUSED = [
    "CON",
    "nul",
    "Com1",
    "lpt9",
    "aux.v2",
    "com¹",
    "last.",
    "last ",
    "a<b",
    "a>b",
    "a:b",
    'a"b',
    "a|b",
    "a?",
    "a*",
    "a\tb",
    "a\x00b",
]
REFUSED += ["é" * 91, "a\udcff", "", "a/b", "a\\b"]
TAKEN = ["last", "console", "null", "com10", "com", "my model v1.2", "été", "日本", "-x", ".hidden", "a" * 180]


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_names_that_a_system_forbids_are_refused_on_all(home: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"output_name: expected"):
        flags.resolve_all([*LINE, name], "network")


@pytest.mark.parametrize("name", TAKEN, ids=ascii)
def test_other_names_are_taken(home: Path, name: str) -> None:
    assert flags.resolve_all([*LINE[:-1], f"--output_name={name}"], "network").config.output.output_name == name
