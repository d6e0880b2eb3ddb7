"""Weight files: header alone, load, atomic save, digests; imports torch only where tensors are touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sfumato.errors import UserError, WriteError
from sfumato.formats import gguf, header, leftovers
from sfumato.formats.header import DTYPES, LARGEST, Header, TensorInfo
from sfumato.formats.paths import printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sfumato.formats.planned import Writable

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of pickled weight files; everything else is taken for safetensors."""
PIECE = 1 << 18
"""Bytes that are written at once: Linux takes a file in such pieces faster than in one of gigabytes."""
_SPELLING = {f"torch.{theirs}": name for name, theirs in DTYPES.items()}


# --- reading ---


def read_header(path: str | Path) -> Header:
    """Names, dtypes, shapes and metadata, without the values.

    A pickle is mapped, not read, but needs torch; the metadata of a GGUF file are its facts. Errors: `UserError` for a
    file that is missing, empty, truncated, or not a weight file.
    """
    path = _existing(path)
    if path.suffix in PICKLES:
        return _pickle_header(path)
    if gguf.is_gguf(path):
        return gguf.read(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(LARGEST, size - 8) else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if text is None:
        raise UserError(_not_safetensors(path, size, length))
    return header.parse(text, size, str(path))


def load(path: str | Path) -> dict[str, Tensor]:
    """{name: tensor} of a .safetensors, .ckpt, .pt, .pth or .bin file, memory-mapped where the format can be.

    Pickles are read without running any code in them; "state_dict" is unwrapped, numbers and strings beside tensors
    are left out. Errors: as `read_header`.
    """
    path = _existing(path)
    if path.suffix in PICKLES:
        return _unpickle(path)
    if gguf.is_gguf(path):
        raise UserError(f"{path}: a GGUF file, which is read as a base model or a text encoder alone")
    check_known(path, read_header(path))
    with mapped(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_known(path: Path, found: Header) -> None:
    """Errors: `UserError` for tensors in formats that cannot be read."""
    odd = [
        f"{name!r} ({info.dtype})"
        for name, info in found.tensors.items()
        if info.dtype not in DTYPES and not gguf.is_block(info.dtype)
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(
            f"{path}: holds tensors in formats that cannot be read: {', '.join(odd[:3])}{more}; known are "
            f"{', '.join(DTYPES)}"
        )


def mapped(path: Path) -> Any:
    """The safetensors library's view of a file. Errors: `UserError` for what the library refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def torch_dtype(spelling: str) -> torch.dtype:
    """torch's dtype for safetensors' spelling of it ("BF16")."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[spelling])
    return dtype


def _existing(path: str | Path) -> Path:
    path = Path(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: is a folder, expected a weight file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: is not a file of bytes (a pipe or a device), expected a weight file")
    if status.st_size == 0:
        raise UserError(f"{path}: the file is empty; was the download or the save interrupted?")
    return path


def _not_safetensors(path: Path, size: int, length: int) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path}: a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"{path}: a web page, not a weight file; the download did not succeed"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return f"{path}: a pickled file; rename it to {path.with_suffix('.ckpt').name}"
    if length <= LARGEST and start[8:9] == b"{":
        return (
            f"{path}: truncated: the header alone has {length:,} bytes, the file has {size:,}; download or copy it "
            "again"
        )
    return f"{path}: not a safetensors file"


# --- pickles ---


class _Inert:
    """Stands in for a class of the program that wrote a pickle (lightning's callbacks); does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickle by dotted name, without running code: `torch.load(weights_only=True)`."""
    import pickle

    import torch

    try:
        zipped = zipfile.is_zipfile(path)
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        inert: list[Any] = [(_Inert, name) for name in strange if name.startswith(("pytorch_lightning.", "lightning."))]
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        wrong = f"holds code ({what[1]})" if what else "cannot be read as plain tensors"
        raise UserError(f"{path}: {wrong}, which sfumato does not run; ask for a .safetensors of it") from None
    except Exception as error:  # a broken pickle can raise anything
        why = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise UserError(f"{path}: truncated, or not a file that torch saved ({why})") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    try:
        tensors = dict(_flat(content))
    except RecursionError:
        raise UserError(f"{path}: its tables are nested too deeply for a weight file") from None
    if odd := [name for name, t in tensors.items() if t.layout != torch.strided or t.is_meta or t.is_quantized]:
        raise UserError(
            f"{path}: tensor {odd[0]!r} is sparse, quantised or without values, which cannot be read; save it as plain "
            "numbers"
        )
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def _flat(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(content, torch.Tensor):
        yield prefix, content.detach()
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(content, tuple | list) and prefix.isdigit():  # the two nets of a hypernetwork for one width
        yield from _flat(dict(enumerate(content)), prefix)


def _pickle_header(path: Path) -> Header:
    tensors, at = {}, 0
    for name, t in _unpickle(path).items():
        tensors[name] = TensorInfo(_SPELLING.get(str(t.dtype), str(t.dtype)), tuple(t.shape), at, at + t.nbytes)
        at += t.nbytes
    return Header(tensors)


# --- writing ---


@contextmanager
def aside(path: str | Path, needed: int = 0, *, of_many: bool = False) -> Iterator[Path]:
    """A temporary path in the same folder, which becomes `path` when the block ends well.

    `path` holds its old content or the whole new one, whatever happens; after a failure the temporary file is
    gone. `needed`: bytes about to be written, for the message. `of_many`: it is one of many files, whose leftovers
    the caller clears, and which it syncs all at once (`sync_all`). Errors: `WriteError` when the disk is full or the
    folder cannot be written.
    """
    path = Path(path)
    of_many = of_many and hasattr(os, "sync")
    temp = leftovers.file_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not of_many:
            leftovers.clear_file(path)
        temp.touch()
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield temp
        if not of_many:
            _sync(temp)
        os.replace(temp, path)
    except BaseException as error:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        if isinstance(error, Exception) and is_full(error):
            raise WriteError(full_disk(path, needed)) from error
        if isinstance(error, OSError):
            raise WriteError(f"{path}: could not be written: {error.strerror or error}") from error
        raise
    if not of_many:
        _sync(path.parent)


def sync_all() -> None:
    """Have on the disk itself what was written `of_many`."""
    if hasattr(os, "sync"):
        os.sync()


def save(
    path: str | Path,
    tensors: Mapping[str, Writable],
    metadata: Mapping[str, str] | None = None,
    check: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a weight file, atomically; the ending chooses safetensors or a pickle (which holds no metadata).

    The same tensors and metadata give the same bytes. A planned tensor is made when its turn has come, and given up
    when it is written (in a pickle: when all are). `check` is called when all is written and may still refuse.
    `progress`: (done, all) bytes of a safetensors file. Errors: `WriteError` as `aside`; the old file is untouched
    then.
    """
    path = Path(path)
    total = sum(t.nbytes for t in tensors.values())
    report = progress or (lambda done, total: None)
    with aside(path, total) as temp:
        with temp.open("wb") as file:
            if path.suffix in PICKLES:
                import torch

                torch.save({name: _made(name, t).detach().cpu().contiguous() for name, t in tensors.items()}, file)
            else:
                _write(file, serialise(tensors, metadata), lambda done: report(min(done, total), total))
        if check:
            check()


def _write(file: BinaryIO, parts: Iterable[bytes | memoryview], written: Callable[[int], None]) -> None:
    """Write each part in a thread while the next one is made, so two of them are in memory at most."""

    def put(part: bytes | memoryview) -> int:
        for at in range(0, len(part), PIECE):
            file.write(part[at : at + PIECE])
        return file.tell()

    with ThreadPoolExecutor(1) as thread:
        writing: Future[int] | None = None
        for part in parts:
            if writing:
                written(writing.result())
            writing = thread.submit(put, part)
        if writing:
            written(writing.result())


def serialise(
    tensors: Mapping[str, Writable], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """A safetensors file: first its header, then the bytes of one tensor after another, laid out as the safetensors
    library does.

    The library itself needs all tensors in memory at once, writes metadata in random order, and makes files
    that only their owner can read.
    """
    order = list(DTYPES)
    rank = {name: order.index(_spelling(name, t)) for name, t in tensors.items()}
    names = sorted(tensors, key=lambda name: (-rank[name], name.encode()))
    entries: dict[str, Any] = {"__metadata__": {k: printable(v) for k, v in metadata.items()}} if metadata else {}
    at = 0
    for name in names:
        t = tensors[name]
        entries[name] = {"dtype": order[rank[name]], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        yield _bytes(_made(name, tensors[name]))


def _spelling(name: str, tensor: Writable) -> str:
    if str(tensor.dtype) not in _SPELLING:
        raise UserError(f"tensor {name!r}: safetensors has no {tensor.dtype}")
    return _SPELLING[str(tensor.dtype)]


def _made(name: str, tensor: Writable) -> Tensor:
    import torch

    if isinstance(tensor, torch.Tensor):
        return tensor
    made = tensor.make()
    if made.dtype != tensor.dtype or made.shape != tensor.shape:
        raise RuntimeError(
            f"tensor {name!r} was planned as {tensor.dtype} {list(tensor.shape)} and made as {made.dtype} "
            f"{list(made.shape)}"
        )
    return made


def _bytes(tensor: Tensor) -> memoryview:
    """The values as they lie in memory, in order of rows."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, atomically. Errors: as `aside`."""
    data = text.encode()
    with aside(path, len(data)) as temp:
        temp.write_bytes(data)


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk or an exhausted quota lies behind an error, through whatever library it came."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        # safetensors and torch raise their own errors, which carry the system's as text.
        if re.search(r"os error (28|122|27)\b|No space left|[Qq]uota exceeded", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk(path: Path, needed: int) -> str:
    """The message for a full disk: what was needed and what is free."""
    free = shutil.disk_usage(path.parent).free
    return (
        f"{path}: the disk is full: {needed:,} bytes needed, {free:,} free; nothing was written: make room or choose "
        "another folder"
    )


def _sync(path: Path) -> None:
    """Have the bytes of a file, or the names of a folder, on the disk itself."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle on a folder; its renames are journalled
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- content ---


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floating-point numbers holds neither NaN nor infinity."""
    import torch

    values = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite knows no 8-bit floats
    # The extremes are NaN where any number is; they cost an eighth of looking at each, and less than a sum.
    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def check_finite(tensors: Mapping[str, Tensor], what: str, cast: torch.dtype | None = None) -> None:
    """Errors: `UserError` naming the first tensors with NaN or infinity; `what`: which weights these are.

    `cast`: the format that they were just cast to, for the advice: what is finite in fp32 may be too large for fp16.
    """
    import torch

    bad = [
        f"{name} ({int((~torch.isfinite(t.float())).sum()):,} of {t.numel():,} values)"
        for name, t in tensors.items()
        if t.is_floating_point() and not all_finite(t)
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        small = cast is not None and torch.finfo(cast).max < torch.finfo(torch.float32).max / 10
        advice = (
            f"; save_precision {str(cast).removeprefix('torch.')} may be too small for them: choose bf16 or float"
            if small
            else ""
        )
        raise UserError(f"{what}: NaN or infinite values in {', '.join(bad[:3])}{more}{advice}")


def finite(tensors: Mapping[str, Writable], what: str, cast: torch.dtype | None = None) -> dict[str, Writable]:
    """The same, as `check_finite`: those that are planned are checked when they are made."""
    import torch

    def checked(name: str, tensor: Tensor) -> Tensor:
        check_finite({name: tensor}, what, cast)
        return tensor

    made = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    check_finite(made, what, cast)
    return {name: made[name] if name in made else t.then(partial(checked, name)) for name, t in tensors.items()}  # type: ignore[union-attr]


def fingerprint(tensors: Mapping[str, Writable]) -> str:
    """Hash of names, dtypes, shapes and values; the order of the tensors does not matter. Planned ones are made one
    after another."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\0".encode())
        digest.update(_bytes(_made(name, tensors[name])))
    return digest.hexdigest()


def stamp(path: str | Path) -> list[int]:
    """Changes whenever a file does: what is known of its content may be remembered by this.

    Size and time of writing alone would not do: a copy may keep another file's. Empty when the file is gone.
    """
    try:
        return stamp_of(os.stat(path))
    except OSError:
        return []  # reading it says why


def stamp_of(status: os.stat_result) -> list[int]:
    """The stamp of a file that was looked at already."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
