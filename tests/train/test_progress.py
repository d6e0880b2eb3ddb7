from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest

from sfumato.train import progress

NAMES = [
    "/data/[bold]cats[/]/a.png",
    "[/home/me]",
    "[v2] model",
    "lora [red]x.safetensors",
    ":cat:",
    "[",
    "[]",
    "[link=x]",
]
PACKAGE = Path(progress.__file__).parents[1]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_square_brackets_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    progress.console.print(f"{name}: done")
    progress.answers.print(f"{name}: planned")
    progress.print_table(("folder", name), [(name, "1")])
    text = capsys.readouterr()
    assert text.err == f"{name}: done\n" and text.out.startswith(f"{name}: planned\n") and text.out.count(name) == 3


def test_a_live_bar_prints_its_title_and_note_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    monkeypatch.setattr(progress.console, "_file", screen)
    monkeypatch.setattr(progress.console, "_force_terminal", True)
    monkeypatch.setattr(progress.console, "_width", 200)
    for name in NAMES:
        bar = progress.Bar(f"at {name}", 2)
        bar.to(1, f"now {name}")
        bar.close()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
        assert f"at {name}" in shown and f"now {name}" in shown


def test_a_long_path_is_not_cut_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/data/" + "x" * 300
    progress.print_table(("files",), [(path,)])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines() if "x" in line]
    assert "".join(lines) == path


@pytest.mark.parametrize("width", [30, 60, 80])
def test_only_the_longest_cells_of_a_table_are_broken_and_nothing_is_lost(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.answers, "_width", width)
    folder = "/home/someone/写真/" + "x" * 80
    columns = ("dataset", "folder", "kind", "images", "repeats", "samples an epoch", "enlarged")
    progress.print_table(columns, [("1", folder, "regularisation", "12345", "10", "123450", "0")])
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in capsys.readouterr().out.splitlines()]
    heading = [" ".join(cells).split() for cells in zip(*[line for line in lines if line][:3], strict=True)]
    assert [tuple(name.split()) for name in columns] == [tuple(words) for words in heading if words], heading
    body = [line for line in lines if line][3:]
    assert "".join(line[1] for line in body) == folder
    assert body[0][2:] == ["regularisation", "12345", "10", "123450", "0"]


def test_all_consoles_are_made_in_one_place() -> None:
    pattern = r"\b(?:Console|TextColumn|Table)\(|rich\.print|from rich import"
    others = {
        p.name: found
        for p in PACKAGE.rglob("*.py")
        if p.name != "progress.py" and (found := re.findall(pattern, p.read_text(encoding="utf-8")))
    }
    assert others == {}
    assert "TextColumn(" not in (PACKAGE / "train" / "progress.py").read_text(encoding="utf-8").replace(
        "TextColumn(template, markup=False)", ""
    )
