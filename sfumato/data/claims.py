"""Processes that fill one cache at the same time make each entry once: who makes which is written down beside it.

A claim is a row of the index, of a process that holds a lock of the operating system on a file of its own. The lock
ends with the process, however that ends, and with it all its claims.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from sfumato.data.store import AT_ONCE, FileIndex, TensorStore
from sfumato.formats.leftovers import STALE


class Job(Protocol):
    """An entry to be made."""

    @property
    def key(self) -> str:
        """Its name in the store."""
        ...


_Job = TypeVar("_Job", bound=Job)
_TABLE = "CREATE TABLE IF NOT EXISTS claims (name TEXT PRIMARY KEY, owner TEXT) WITHOUT ROWID"
SHARE = 256
"""Entries that a process claims at a time; others that fill the same cache take the next ones."""
PAUSE = 0.2
"""Seconds between two looks at what others are making."""
_counter = itertools.count()


def shares(
    store: TensorStore, index: FileIndex, portions: Sequence[Sequence[_Job]], size: int = SHARE
) -> Iterator[list[list[_Job]]]:
    """What this process is to make of entries that the store lacks, in shares of about `size`: what others are making
    is left out, and comes at the end if they ended without it. A share must be in the store when the next one is asked
    for.
    """
    if not portions:
        return
    with _owner(store, index) as owner:
        if owner is None:
            yield [list(portion) for portion in portions]
            return
        left: list[_Job] = []
        for share in _grouped(portions, size):
            names = [job.key for portion in share for job in portion]
            free = _claimed(index, owner, names)
            left += [job for portion in share for job in portion if job.key not in free]
            mine = [[job for job in portion if job.key in free and job.key not in store] for portion in share]
            yield [portion for portion in mine if portion]
            _release(index, owner, free)
        while left := [job for job in left if job.key not in store]:
            free = _claimed(index, owner, [job.key for job in left])
            mine = [[job] for job in left if job.key in free and job.key not in store]
            if mine:
                yield mine
            _release(index, owner, free)
            if not free:
                time.sleep(PAUSE)


def _grouped(portions: Sequence[Sequence[_Job]], size: int) -> Iterator[list[Sequence[_Job]]]:
    group: list[Sequence[_Job]] = []
    for portion in portions:
        group.append(portion)
        if sum(map(len, group)) >= size:
            yield group
            group = []
    if group:
        yield group


@contextmanager
def _owner(store: TensorStore, index: FileIndex) -> Iterator[str | None]:
    """This process as one that claims; None where nobody else can reach the store, or locks do not work."""
    if store.root is None or index.root is None:
        yield None
        return
    path = _lock_file(index, f"{os.getpid()}-{next(_counter)}-{time.time_ns()}")
    lock = _locked(path)
    if lock is None:
        yield None
        return
    try:
        _forget_the_dead(index)
        yield path.name
    finally:
        with index.connection() as connection:
            connection.execute(_TABLE)
            connection.execute("DELETE FROM claims WHERE owner = ?", (path.name,))
        _unlock(lock)


def _lock_file(index: FileIndex, owner: str) -> Path:
    assert index.root is not None
    return index.root / "making" / owner


def _locked(path: Path) -> BaseFileLock | None:
    """The lock on a file; None when another has it, or there are no locks here."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except (Timeout, OSError, NotImplementedError):
        return None
    return lock


def _unlock(lock: BaseFileLock) -> None:
    if os.name != "nt":  # which refuses while it is open
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)


def _forget_the_dead(index: FileIndex) -> None:
    """Remove the claims of processes that were killed."""
    with index.connection() as connection:
        connection.execute(_TABLE)
        owners = {owner for (owner,) in connection.execute("SELECT DISTINCT owner FROM claims")}
    for path in _lock_file(index, "").glob("*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE:  # its process has locked it by now, or is gone
                owners.add(path.name)
    for owner in owners:
        if _is_dead(index, owner):
            with index.connection() as connection:
                connection.execute("DELETE FROM claims WHERE owner = ?", (owner,))


def _is_dead(index: FileIndex, owner: str) -> bool:
    path = _lock_file(index, owner)
    if not path.exists():
        return True
    lock = _locked(path)
    if lock:
        _unlock(lock)
    return lock is not None


def _claimed(index: FileIndex, owner: str, names: Sequence[str]) -> set[str]:
    """Claim entries; those that are free, or whose makers are dead."""
    taken: dict[str, str] = {}
    with index.connection() as connection:
        connection.execute(_TABLE)
        connection.execute("BEGIN IMMEDIATE")
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            marks = ",".join("?" * len(some))
            taken |= dict(connection.execute(f"SELECT name, owner FROM claims WHERE name IN ({marks})", some))
        dead = {other for other in set(taken.values()) if _is_dead(index, other)}
        free = {each for each in names if each not in taken or taken[each] in dead}
        connection.executemany("INSERT OR REPLACE INTO claims VALUES (?, ?)", [(each, owner) for each in free])
    return free


def _release(index: FileIndex, owner: str, names: set[str]) -> None:
    with index.connection() as connection:
        rows = [(each, owner) for each in names]
        connection.executemany("DELETE FROM claims WHERE name = ? AND owner = ?", rows)
