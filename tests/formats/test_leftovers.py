"""What killed runs leave is found again; what a user or a living process owns is never touched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sfumato.formats import files, leftovers, run


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def state(folder: Path, step: int = 1) -> Path:
    run.save_run(folder, {"a": {"x": torch.ones(1)}}, {"step": step})
    return folder


def anything(name: str) -> bool:
    return True


def test_what_a_user_keeps_beside_results_is_not_touched(tmp_path: Path) -> None:
    for name in (".holiday.part", ".backup.old", ".out-state.old", ".notes", ".out.123.part.d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".draft.part").write_text("mine")
    os.utime(tmp_path / ".draft.part", (0, 0))
    before = sorted(tmp_path.rglob("*"))
    leftovers.clear(tmp_path, anything)
    state(tmp_path / "out-state")
    assert run.newest(tmp_path, ".*") == tmp_path / "out-state"
    run.load_run(tmp_path / "out-state")
    assert [
        p for p in sorted(tmp_path.rglob("*")) if "out-state" not in p.parts[len(tmp_path.parts)] or ".old" in str(p)
    ] == before


def test_a_folder_with_foreign_files_in_it_is_not_removed_whatever_its_name(tmp_path: Path, dead: int) -> None:
    for kind in ("part", "old"):
        (tmp_path / f".out.{dead}.{kind}").mkdir()
        (tmp_path / f".out.{dead}.{kind}" / "photo.jpg").write_text("mine")
    leftovers.clear(tmp_path, anything)
    assert len(list(tmp_path.rglob("photo.jpg"))) == 2


def test_leftovers_of_killed_runs_are_found_again_whatever_their_step(tmp_path: Path, dead: int) -> None:
    for name in (
        f".out-step00000400.{dead}-7.part.safetensors",
        f".out.{dead}-1.part.toml",
        f".out-000004_clip_l.{dead}-0.part.pt",
    ):
        (tmp_path / name).write_text("half")
    state(tmp_path / "s").rename(tmp_path / f".out-step00000400-state.{dead}.part")
    leftovers.clear(tmp_path, lambda name: name.startswith("out"))
    assert not list(tmp_path.iterdir())


def test_what_a_living_process_writes_is_not_touched(tmp_path: Path) -> None:
    waiting = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for pid in (os.getpid(), waiting.pid):
            (tmp_path / f".out.{pid}-0.part.safetensors").write_text("half")
            (tmp_path / f".out.{pid}.part").mkdir()
            state(tmp_path / "s").rename(tmp_path / f".out-state.{pid}.old")
        before = sorted(tmp_path.iterdir())
        leftovers.clear(tmp_path, anything)
        assert sorted(tmp_path.iterdir()) == before
    finally:
        waiting.communicate(b"\n")


def test_a_number_that_another_process_has_now_does_not_keep_a_leftover(tmp_path: Path) -> None:
    old = tmp_path / f".out.{os.getpid()}-0.part.safetensors"
    old.write_text("half")
    os.utime(old, (1000, 1000))  # long before this process began
    leftovers.clear(tmp_path, anything)
    assert not old.exists()


def test_a_result_that_stands_only_as_old_comes_back(tmp_path: Path, dead: int) -> None:
    state(tmp_path / "out-state", 3).rename(tmp_path / f".out-state.{dead}.old")
    model = tmp_path / f".out.{dead}.old"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    assert sorted(leftovers.clear(tmp_path, anything)) == [tmp_path / "out", tmp_path / "out-state"]
    assert run.load_run(tmp_path / "out-state")[1] == {"step": 3}
    state(tmp_path / "s").rename(tmp_path / f".out-state.{dead}.old")
    assert not leftovers.clear(tmp_path, anything)
    assert run.load_run(tmp_path / "out-state")[1] == {"step": 3}
    assert sorted(os.listdir(tmp_path)) == ["out", "out-state"]


def test_a_file_of_a_dead_process_that_was_just_touched_stays_while_others_may_write(tmp_path: Path, dead: int) -> None:
    """Its number may be that of a process of another machine on the same disk."""
    rest = tmp_path / f".a.{dead}-0.part.txt"
    rest.write_text("half")
    files.write_text(tmp_path / "a.txt", "new")
    assert rest.exists()
    os.utime(rest, (0, 0))
    files.write_text(tmp_path / "a.txt", "newer")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_that_goes_while_a_folder_is_listed_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f".{name}.safetensors.{2**22 + 1}-0.part.safetensors" for name in ("gone", "there")]
    for name in names:
        (tmp_path / name).touch()
    real = os.scandir

    class Racing:
        """The listing, in which one file is removed as soon as it was named."""

        def __init__(self, path: Path) -> None:
            self.listing = real(path)

        def __enter__(self) -> Racing:
            return self

        def __exit__(self, *_: object) -> None:
            self.listing.close()

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            for entry in self.listing:
                if "gone" in entry.name:
                    os.unlink(entry.path)
                yield entry

    before = [each.path.name for each in leftovers.found(tmp_path, anything)]
    monkeypatch.setattr(os, "scandir", Racing)
    after = [each.path.name for each in leftovers.found(tmp_path, anything)]
    # Windows has the facts of a file with its name, and so may still list the one that goes.
    assert sorted(before) == sorted(names) and names[1] in after


def test_a_file_that_goes_while_it_is_looked_at_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A living run renames files in the folder that it writes, while another one looks for what was left."""
    state(tmp_path / "out-state")
    part = state(tmp_path / "new").rename(tmp_path / f".out-state.{os.getpid()}.part")
    gone = part / ".a.1-0.part.safetensors"
    gone.touch()
    lstat = Path.lstat

    def racing(path: Path) -> os.stat_result:
        if path == gone:
            raise FileNotFoundError(2, "gone", str(path))
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", racing)
    assert leftovers.clear(tmp_path, anything) == []
    assert part.is_dir() and run.load_run(tmp_path / "out-state")[1] == {"step": 1}
