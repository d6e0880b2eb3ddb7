"""Two runs never write the same results: the second is refused, and nothing of a lock is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import config

from sfumato.errors import UserError
from sfumato.train import lock

HOLD = "import sys; from pathlib import Path; from sfumato.train import lock\nwith lock.alone(Path(sys.argv[1]), 'me'): print('held', flush=True); input()"


def test_a_second_run_of_the_same_name_is_refused_naming_the_first(tmp_path: Path) -> None:
    settings = config(output_dir=str(tmp_path), output_name="me")
    assert lock.taken(settings) == ""
    assert not list(tmp_path.iterdir())
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout and first.stdout.readline().strip() == b"held"
        with (
            pytest.raises(UserError, match=r"output_name: another run \(.*process .*\) writes 'me'"),
            lock.alone(tmp_path, "me"),
        ):
            pytest.fail("two at once")
        assert "another run" in lock.taken(settings)
        if os.name != "nt":  # where a locked file cannot be read
            assert f"process {first.pid})" in lock.taken(settings)
        with (
            lock.alone(tmp_path, "other"),
            lock.alone(tmp_path / "deeper", "me"),
            lock.alone(tmp_path, "me", main=False),
        ):
            pass
    finally:
        first.kill()
        first.communicate()
    assert lock.taken(settings) == ""
    with lock.alone(tmp_path, "me"):
        assert "another run" in lock.taken(settings)
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_badly_leaves_no_lock_and_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError), lock.alone(tmp_path / "a" / "b", "me"):
        raise ValueError
    assert not list(tmp_path.iterdir())
    with lock.alone(tmp_path / "a" / "b", "me"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b", "result"]


def test_where_no_lock_can_be_had_the_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(self: object, **_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.FileLock, "acquire", none)
    with lock.alone(tmp_path, "me"):
        pass
    assert "no lock can be had here" in capsys.readouterr().err


def test_what_killed_runs_of_the_name_left_is_cleared_when_a_run_begins(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = [
        f".me-step00000400.{ended.pid}-7.part.safetensors",
        f".me-loss.{ended.pid}-1.part.png",
        f"sample/.me_000001_00.{ended.pid}-1.part.png",
    ]
    others = [f".you.{ended.pid}-7.part.safetensors", ".me.part"]
    (tmp_path / "sample").mkdir()
    for name in mine + others:
        (tmp_path / name).write_text("half")
    with lock.alone(tmp_path, "me"):
        assert [(tmp_path / name).exists() for name in mine + others] == [False] * len(mine) + [True] * len(others)
