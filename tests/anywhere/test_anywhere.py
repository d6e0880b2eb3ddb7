"""sfumato runs on Windows, macOS and Linux: no module and no name that only POSIX has, and consoles that know few letters."""

from __future__ import annotations

import ast
import io
import os
import runpy
import sys
from pathlib import Path

import pytest
from launching import forked

from sfumato.cli.main import guarded

ROOT = Path(__file__).parents[2]
FILES = sorted(p for folder in ("sfumato", "scripts", "examples") for p in (ROOT / folder).rglob("*.py"))
ONLY_POSIX = {
    "os": (
        "O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC chown confstr fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg "
        "getpgid getpgrp getpriority getsid getuid killpg lchown mkfifo mknod nice pread preadv pwrite pwritev posix_fadvise "
        "posix_fallocate posix_spawn sched_getaffinity sched_setaffinity sendfile setsid setuid statvfs sync sysconf tcgetpgrp uname wait3"
    ),
    "signal": "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 alarm pause setitimer",
}
CAUGHT = {("sfumato/tools/doctor.py", "sysconf"), ("sfumato/formats/files.py", "sync")}
"""Where the lack of it is expected."""


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_is_used_that_only_posix_has(path: Path) -> None:
    used = [
        f"line {node.lineno}: {node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.attr in ONLY_POSIX.get(node.value.id, "").split()
        if (path.relative_to(ROOT).as_posix(), node.attr) not in CAUGHT
    ]
    assert not used


def test_a_training_starts_without_posix_and_with_spawned_workers(model: Path, images: Path, tmp_path: Path) -> None:
    folder = images.rename(images.with_name("1_images")).parent
    assert forked(elsewhere, str(model), str(folder), str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "out.safetensors").is_file()


def elsewhere(*words: str) -> None:
    """`PYTHONIOENCODING=cp1252 python elsewhere.py WORDS`, by a process that has imported nothing of sfumato."""
    for name in [name for name in sys.modules if name.split(".")[0] == "sfumato"]:
        del sys.modules[name]
    os.environ |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="cp1252")
    sys.argv = ["elsewhere.py", *words]
    runpy.run_path(str(Path(__file__).with_name("elsewhere.py")), run_name="__main__")


def test_a_console_that_lacks_a_letter_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding="cp1252", write_through=True))

    def job() -> int:
        print("猫.png")
        print("猫.png", file=sys.stderr)
        return 0

    assert guarded(job) == 0
    assert [stream.getvalue().split() for stream in written.values()] == [[b"\\u732b.png"]] * 2
