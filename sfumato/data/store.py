"""What is kept between runs: tensors found by the content they were made of, and what is known of files."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.data.entries import Damaged, facts, unpack
from sfumato.errors import UserError
from sfumato.formats import files, leftovers
from sfumato.formats.paths import printable

KeyParts = Mapping[str, object]
"""What an entry depends on, by name; JSON values."""
Progress = Callable[[int, int], None]
"""Called with (done, total) as work goes on."""


def default_root() -> Path:
    """Where caches on disk live when the user names no place."""
    return Path("~/.cache/sfumato").expanduser()


def key(parts: KeyParts) -> str:
    """The name of an entry: a hash of all it depends on, 40 hexadecimal digits."""
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).hexdigest()


class Keys:
    """`key` for many, of which one part alone differs: the text is made once, with a hole."""

    def __init__(self, name: str, others: Callable[[], KeyParts]) -> None:
        before, _, self._after = json.dumps(dict(others()) | {name: _HOLE}, sort_keys=True).partition(json.dumps(_HOLE))
        self._before = blake2b(before.encode(), digest_size=20)

    def of(self, value: str) -> str:
        """`key` with this value of the part."""
        made = self._before.copy()
        made.update((json.dumps(value) + self._after).encode())
        return made.hexdigest()


_HOLE = "\0"
_TABLE = "CREATE TABLE IF NOT EXISTS known (kind TEXT, name TEXT, value TEXT, PRIMARY KEY (kind, name)) WITHOUT ROWID"
AT_ONCE = 500
"""Rows that are asked for at once: SQLite takes 999 values in a query, or more."""


@dataclass(slots=True)
class TensorStore:
    """Named tensors by key: one safetensors file per entry below `root`, or the memory of this process when `root` is
    None.

    A file is written aside and renamed, so an entry is whole or absent, however the run ends.
    """

    root: Path | None = None
    _memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _cleared: bool = False

    def path(self, name: str) -> Path:
        """The file of an entry; folders are named by its first two letters, which keeps them short."""
        assert self.root is not None
        return self.root / "entries" / name[:2] / f"{name}.safetensors"

    def stamps(self, names: Iterable[str]) -> dict[str, list[int]]:
        """The stamp of each entry's file, of those that are there."""
        assert self.root is not None
        start = os.path.join(self.root, "entries", "")  # `path` takes several times as long
        return {n: found for n in names if (found := files.stamp(f"{start}{n[:2]}{os.sep}{n}.safetensors"))}

    def __contains__(self, name: str) -> bool:
        return name in self._memory if self.root is None else self.path(name).is_file()

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, or None when there is none of this name.

        Raises Damaged, and removes the entry, when it is not what was stored.
        """
        if self.root is None:
            return self._memory.get(name)
        try:
            # Bytes, not a memory map: a map would break if another run replaced the file meanwhile.
            return unpack(name, self.path(name).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Damaged(f"its entry cannot be read ({error.strerror})") from error
        except Damaged:
            with suppress(OSError):
                self.path(name).unlink(missing_ok=True)  # so that the next start sees that it is missing
            raise

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store an entry. Raises UserError when the disk is full."""
        stored = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        if self.root is None:
            self._memory[name] = stored
            return
        size = sum(t.nbytes for t in stored.values())
        with files.aside(self.path(name), size, of_many=True) as temp, temp.open("wb") as file:
            for part in files.serialise(stored, facts(name, stored)):
                file.write(part)

    def clear(self) -> None:
        """Remove what killed processes left half-written, once."""
        if self.root is None or self._cleared:
            return
        self._cleared = True
        for folder in (self.root / "entries").glob("??"):
            for left in leftovers.found(folder, lambda _: True, leftovers.STALE):
                if left.kind == "file":
                    left.path.unlink(missing_ok=True)


@contextmanager
def writing(store: TensorStore, ahead: int = 8) -> Iterator[Callable[[str, Mapping[str, Tensor]], None]]:
    """`store.put` beside other work: the disk is waited for only when more than `ahead` entries are on their way, and
    at the end. What killed processes left is cleared away before the first.

    Raises what `put` raises, at a later `put` or at the end.
    """
    waiting: deque[Future[None]] = deque()

    def put(name: str, tensors: Mapping[str, Tensor]) -> None:
        store.clear()
        waiting.append(pool.submit(store.put, name, tensors))
        if len(waiting) > ahead:
            waiting.popleft().result()

    with ThreadPoolExecutor(4) as pool:
        yield put
        for future in waiting:
            future.result()


@dataclass(slots=True)
class FileIndex:
    """What is known by (kind, name), in one sqlite file below `root`, or in memory when `root` is None.

    Only what can be worked out again is in it, so the file may be deleted at any time.
    Connections live for one call: a FileIndex can be copied to another process.
    """

    root: Path | None = None
    _memory: dict[tuple[str, str], str] = field(default_factory=dict)

    def read(self, kind: str, names: Iterable[str]) -> dict[str, Any]:
        """What was written of these names; names that are not known are left out."""
        if self.root is None:
            known = {n: self._memory.get((kind, printable(n))) for n in names}
            return {n: json.loads(text) for n, text in known.items() if text is not None}
        asked = {printable(name): name for name in names}
        if not asked:
            return {}
        stored, rows = sorted(asked), list[tuple[str, Any]]()  # in the order in which they lie in the file
        with self.connection() as connection:
            for start in range(0, len(stored), AT_ONCE):
                some = stored[start : start + AT_ONCE]
                marks = ",".join("?" * len(some))
                query = f"SELECT name, value FROM known WHERE kind = ? AND name IN ({marks})"
                rows += connection.execute(query, (kind, *some))
        return {asked[name]: value for name, value in _parsed(rows)}

    def write(self, kind: str, values: Mapping[str, object]) -> None:
        """Store JSON values by name, replacing earlier ones."""
        if not values:
            return
        rows = [(kind, printable(name), json.dumps(value, sort_keys=True)) for name, value in values.items()]
        if self.root is None:
            self._memory.update({(k, n): v for k, n, v in rows})
            return
        with self.connection() as connection:
            connection.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", rows)

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """The database, for one transaction. Errors: `UserError`."""
        assert self.root is not None
        file = self.root / "index.sqlite"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # Another run may be writing: wait for it.
            with closing(sqlite3.connect(file, timeout=60)) as connection, connection:
                connection.execute(_TABLE)
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{file}: the cache's index cannot be used: {error}; delete it if it is damaged, or choose another "
                "cache_dir"
            ) from error


def _parsed(rows: Sequence[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    """Rows with their values read; a damaged one is not known, and worked out again."""
    with suppress(ValueError, TypeError, RecursionError):
        # One text is read in half the time of many; a value that is none would not leave as many of them.
        values = json.loads("[" + ",".join(text for _, text in rows) + "]")
        if len(values) == len(rows):
            return zip((name for name, _ in rows), values, strict=True)
    return ((name, json.loads(text)) for name, text in rows if _is_json(text))


def _is_json(text: Any) -> bool:
    try:
        json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def unusable(
    store: TensorStore,
    index: FileIndex,
    names: Iterable[str],
    mismatch: Callable[[str, Mapping[str, Tensor]], str],
    progress: Progress | None = None,
) -> dict[str, str]:
    """Entry -> why it cannot be used ("" for one that is not there), for those of `names` that cannot.

    An entry on the disk is read and verified once; then `index` knows its file's stamp, and it is read again only when
    that changes.
    `mismatch`: name and tensors -> how they differ from what their key stands for, or nothing.
    """
    names = list(dict.fromkeys(names))
    if store.root is None:
        return {name: "" for name in names if name not in store}
    stamps = store.stamps(names)
    known = index.read("entry", stamps)
    todo = [name for name in stamps if known.get(name) != stamps[name]]
    found = {name: "" for name in names if name not in stamps}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(
            0, len(todo), 256
        ):  # in portions, so that a run that is killed here has stored most of what it found
            portion = todo[start : start + 256]
            wrong = dict(zip(portion, pool.map(lambda name: _wrong(store, name, mismatch), portion), strict=True))
            found |= {name: reason for name, reason in wrong.items() if reason is not None}
            index.write("entry", {name: stamps[name] for name, reason in wrong.items() if reason is None})
            if progress:
                progress(start + len(portion), len(todo))
    return found


def _wrong(store: TensorStore, name: str, mismatch: Callable[[str, Mapping[str, Tensor]], str]) -> str | None:
    try:
        entry = store.get(name)
    except Damaged as error:
        return str(error)
    wrong = None if entry is None else mismatch(name, entry)
    if wrong:
        with suppress(OSError):
            store.path(name).unlink(missing_ok=True)  # so that what another process makes meanwhile is known
    return "" if wrong is None else wrong or None


def trust(store: TensorStore, index: FileIndex, names: Iterable[str]) -> None:
    """Remember entries that were made just now as verified, once they are on the disk itself."""
    names = list(names)
    if store.root is not None and names:
        files.sync_all()
        index.write("entry", store.stamps(names))


def why(old: KeyParts | None, new: KeyParts) -> str:
    """In a few words, why an entry must be made: how what it depends on differs from what it last depended on."""
    if not isinstance(old, Mapping):
        return "new"  # or its row is damaged
    changed = [name for name in new if old.get(name) != new[name]]
    if "bucket" in changed:
        changed = [name for name in changed if name not in ("resized", "crop")]  # they follow from it
    return ", ".join(_change(name, old.get(name), new[name]) for name in changed) or "its entry is gone"


_OPAQUE = ("picture", "mask", "caption", "VAE", "text encoder", "crop")
"""Parts whose values mean nothing to a reader."""


def _change(name: str, old: object, new: object) -> str:
    told = f"{_text(old)} -> {_text(new)}"
    return f"{name} changed" if name in _OPAQUE or "\n" in told else f"{name} {told}"


def _text(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
