"""Tensors that stay in their files until they are asked for, so that a checkpoint is never in memory twice."""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import coded, files, gguf
from sfumato.formats.coded import FP8, Coded
from sfumato.formats.header import DTYPES
from sfumato.formats.planned import PlannedTensor

_log = logging.getLogger(__name__)
FLOATS = ("F64", "F32", "F16", "BF16", *FP8)
PIECE = 1 << 16
"""Numbers that are read at once where they are cast; buffers of some MB leave holes in the heap, a tenth of a model in
all."""

PROBES = 16
"""Places of a file that are compared where its times alone do not show whether it was changed."""


class _File:
    """A weight file that stays open, so that all that is read of it is of one file, whatever comes to stand under its
    name."""

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, files.read_header(path)
        files.check_known(path, self.header)
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._handle)
        self._raw = open(self._handle, "rb", buffering=0, closefd=False)  # noqa: SIM115
        self._opened, self._probe, self._warned = os.fstat(self._handle), self._probes(), False
        if (
            max((t.end for t in self.header.tensors.values()), default=0) > self._opened.st_size - self.header.size
            and not self._pickle
        ):
            raise UserError(f"{path}: changed while it was opened; start again when nothing writes it any longer")
        self._pickled = files.load(path) if self._pickle else None
        self.coded = coded.find(path, self.header)
        self._mapped: Any = None

    @property
    def _pickle(self) -> bool:
        return self.path.suffix in files.PICKLES

    def in_place(self) -> bool:
        """Whether the file still stands under its name."""
        try:
            return os.path.samestat(self.path.stat(), self._opened)
        except OSError:
            return False

    def check(self) -> None:
        """Errors: `UserError` if the content was changed since it was opened. One that was renamed, or replaced by
        another file, is as it was: it is open here.

        What is mapped cannot be guarded wholly: a file cut short between this check and the use of its pages ends the
        process by SIGBUS, which Python cannot catch. So training on the CPU maps nothing, and elsewhere the maps are
        left before the first step.
        """
        then = self._opened
        try:
            now = os.fstat(self._handle)
            same = (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)
            if (
                same and now.st_ctime_ns != then.st_ctime_ns
            ):  # renamed, linked, other rights; or rewritten and its time set back
                same = self._probes() == self._probe
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self.path}: changed while it was in use, so two models would be mixed; nothing was written from it. "
                "Start again (or resume from the last state) with a file that nothing else writes"
            )
        self._opened = now
        if not self._warned and self.path.exists() and not self.in_place():
            self._warned = True
            _log.warning("%s: another file stands there now; this run goes on with the one that it opened", self.path)

    def _probes(self) -> list[bytes]:
        """Some bytes of the file, from all over it."""
        size, found = os.fstat(self._handle).st_size, []
        for i in range(PROBES):
            self._raw.seek(size * i // PROBES)
            found.append(self._raw.read(512))
        return found

    def weights(self) -> set[str]:
        """The names of all tensors but those that scale others."""
        return self.header.tensors.keys() - coded.companions(self.header.tensors, self.coded)

    def kind(self, name: str) -> str:
        """The number format that a tensor has when it is read."""
        return "BF16" if name in self.coded else self.header.tensors[name].dtype

    def mapped(self, name: str) -> Tensor:
        """The tensor, backed by the file itself."""
        self.check()
        if self._pickled is not None:
            return self._pickled[name]
        if self._mapped is None and self.in_place() and not gguf.is_gguf(self.path):
            self._mapped = files.mapped(self.path)
        if self._mapped is None:
            return self.read(name)
        tensor: Tensor = self._mapped.get_tensor(name)
        return tensor

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, cast to `dtype` (one in codes is bf16, if no other is asked for); no page of
        the file stays mapped, and no second copy is ever whole."""
        if name not in self.coded:
            return self._read(name, dtype)
        of, info = self.coded[name], self.header.tensors[name]
        values = torch.empty(math.prod(info.shape), dtype=dtype or torch.bfloat16).view(-1, of.unit)
        scale, at = coded.by_rows(self._read(of.scale), len(values)) if of.scale else None, 0
        for codes in self._codes(name, len(values), max(1, PIECE // of.unit)):
            rows = slice(at, at := at + len(codes))
            values[rows] = coded.decoded(codes, of, None if scale is None else scale[rows])
        self.check()
        return values.view(info.shape)

    def _codes(self, name: str, units: int, most: int) -> Iterator[Tensor]:
        """(at most `most`, codes of a unit), one after another; each is overwritten by the next."""
        info = self.header.tensors[name]
        kind = files.torch_dtype(info.dtype) if info.dtype in DTYPES else torch.uint8
        if self._pickled is not None:
            yield from torch.split(self._pickled[name].reshape(units, -1), most)
            return
        width = (info.end - info.start) // kind.itemsize // units
        buffer = torch.empty(min(most, units), width, dtype=kind)
        for at in range(0, units, most):
            piece = buffer[: min(most, units - at)]
            # The place is found anew: between two pieces others may read of the file.
            self._raw.seek(self.header.size + info.start + at * width * kind.itemsize)
            self._fill(piece.view(-1))
            yield piece

    def _read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if self._pickled is not None:
            self.check()
            return self._pickled[name].to(dtype, copy=True)
        info = self.header.tensors[name]
        kind = files.torch_dtype(info.dtype)
        values = torch.empty(math.prod(info.shape), dtype=dtype or kind)
        self._raw.seek(self.header.size + info.start)
        if values.dtype == kind:
            self._fill(values)
        else:
            buffer = torch.empty(min(PIECE, len(values)), dtype=kind)
            for piece in torch.split(values, PIECE):
                self._fill(buffer[: len(piece)])
                piece.copy_(buffer[: len(piece)])
        self.check()  # after the reading: what was read until now is sound
        return values.view(info.shape)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor that is in no codes, in memory of their own."""
        if self._pickled is not None:
            return self._pickled[name][rows].clone()
        info = self.header.tensors[name]
        kind = files.torch_dtype(info.dtype)
        start, stop, _ = rows.indices(info.shape[0])
        width = math.prod(info.shape[1:])
        values = torch.empty((stop - start) * width, dtype=kind)
        self._raw.seek(self.header.size + info.start + start * width * kind.itemsize)
        self._fill(values)
        self.check()
        return values.view(stop - start, *info.shape[1:])

    def codes(self, name: str, *, values: bool) -> tuple[Tensor, Tensor | None]:
        """What stands in the file of a tensor in codes, and its scale; without `values`, on the meta device."""
        of, info = self.coded[name], self.header.tensors[name]
        if not of.block:
            return tuple(self._read(n) if values else self._empty(n) for n in (name, of.scale))  # type: ignore[return-value]
        codes = torch.empty(info.end - info.start, dtype=torch.uint8, device="cpu" if values else "meta")
        if values:
            self._raw.seek(self.header.size + info.start)
            self._fill(codes)
            self.check()
        return codes, None

    def _empty(self, name: str) -> Tensor:
        info = self.header.tensors[name]
        return torch.empty(info.shape, dtype=files.torch_dtype(info.dtype), device="meta")

    def planned(self, name: str) -> PlannedTensor:
        """The tensor as it stands in the file (in codes: in bf16), read each time that it is made."""
        info = self.header.tensors[name]
        return PlannedTensor(files.torch_dtype(self.kind(name)), info.shape, lambda: self.read(name))

    def exact(self, name: str) -> PlannedTensor:
        """The tensor in fp32."""
        return PlannedTensor(torch.float32, self.header.tensors[name].shape, lambda: self.read(name, torch.float32))

    def raw(self, name: str) -> PlannedTensor:
        """The tensor byte for byte; one in GGUF's blocks, which stand in no other file, in bf16."""
        info = self.header.tensors[name]
        if info.dtype not in DTYPES:
            return self.planned(name)
        return PlannedTensor(files.torch_dtype(info.dtype), info.shape, lambda: self._read(name))

    def _fill(self, values: Tensor) -> None:
        """The next bytes of the file as these values."""
        view, at = values.view(torch.uint8).numpy().data, 0
        while at < len(view):
            got = self._raw.readinto(view[at:])
            if not got:
                self.check()
                raise UserError(f"{self.path}: ends before its last tensor; download or copy it again")
            at += got


@dataclass(frozen=True, slots=True)
class FileRows:
    """A tensor of a file, of which rows are read as they are asked for."""

    file: _File
    name: str
    device: ClassVar[torch.device] = torch.device("cpu")
    is_meta: ClassVar[bool] = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.file.header.tensors[self.name].shape)

    @property
    def dtype(self) -> torch.dtype:
        return files.torch_dtype(self.file.header.tensors[self.name].dtype)

    def __getitem__(self, rows: slice) -> Tensor:
        """Those rows, in memory of their own."""
        return self.file.rows(self.name, rows)


@dataclass(frozen=True, slots=True)
class Lazy(Mapping[str, Tensor]):
    """{name: tensor}, each read when it is asked for. Names and shapes are known from the headers."""

    places: Mapping[str, tuple[_File, str]]
    """name -> file, and the tensor's name there."""
    dtype: torch.dtype | Callable[[str], torch.dtype | None] | None = None
    """What floating tensors, or that of this name, are cast to as they are read; None: as in the file, codes as
    bf16."""
    map: bool | Callable[[str], bool] = True
    """Whether a tensor, or that of this name, that is wanted as it stands may be backed by the file; False where it is
    copied anyway."""

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Lazy:
        """All tensors of some files: one, or the shards of one; what scales weights in codes is read with them.
        Errors: `UserError` as `files.read_header`."""
        opened = [_File(path) for path in paths]
        return cls(
            {
                n: (file, n)
                for file in opened
                for weights in (file.weights(),)
                for n in file.header.tensors
                if n in weights
            }
        )

    @property
    def paths(self) -> list[Path]:
        """The files that hold them."""
        return sorted({file.path.resolve() for file in self._files()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape}"""
        return {name: file.header.tensors[theirs].shape for name, (file, theirs) in self.places.items()}

    @property
    def kinds(self) -> dict[str, str]:
        """{name: the number format that it has when it is read as it is}"""
        return {name: file.kind(theirs) for name, (file, theirs) in self.places.items()}

    @property
    def coded(self) -> dict[str, Coded]:
        """Those that stand in codes, and how."""
        return {n: file.coded[theirs] for n, (file, theirs) in self.places.items() if theirs in file.coded}

    def check(self) -> None:
        """Errors: `UserError` if a file was changed since it was opened."""
        for file in self._files():
            file.check()

    def in_place(self) -> bool:
        """Whether all files still stand under their names."""
        return all(file.in_place() for file in self._files())

    def _files(self) -> set[_File]:
        return {file for file, _ in self.places.values()}

    def below(self, prefix: str) -> Lazy:
        """Those whose names start with `prefix`, without it."""
        return Lazy(
            {n[len(prefix) :]: place for n, place in self.places.items() if n.startswith(prefix)}, self.dtype, self.map
        )

    def beside(self, prefix: str, others: Lazy) -> Lazy:
        """These, and others with `prefix` before their names."""
        return Lazy({**self.places, **{prefix + n: place for n, place in others.places.items()}}, self.dtype, self.map)

    def only(self, wanted: Callable[[str], bool]) -> Lazy:
        """Those whose names are wanted."""
        return Lazy({n: place for n, place in self.places.items() if wanted(n)}, self.dtype, self.map)

    def cast(
        self,
        dtype: torch.dtype | Callable[[str], torch.dtype | None] | None,
        *,
        map: bool | Callable[[str], bool] = True,
    ) -> Lazy:
        """The same tensors, read in another number format."""
        return Lazy(self.places, dtype, map)

    def form(self, name: str) -> tuple[Coded | None, tuple[int, ...]]:
        """How one stands in codes, if it does, and its shape."""
        file, theirs = self.places[name]
        return file.coded.get(theirs), file.header.tensors[theirs].shape

    def by_rows(self, name: str) -> FileRows | None:
        """One whose rows are read as they are asked for; None: it does not stand as numbers with rows."""
        file, theirs = self.places[name]
        info = file.header.tensors[theirs]
        plain = theirs not in file.coded and info.dtype in FLOATS and len(info.shape) > 1
        return FileRows(file, theirs) if plain else None

    def codes(self, name: str, *, values: bool = True) -> tuple[Tensor, Tensor | None]:
        """Of one that stands in codes: these, as in the file, GGUF's blocks as bytes, and their scale; without
        `values`, on the meta device."""
        file, theirs = self.places[name]
        return file.codes(theirs, values=values)

    def as_stored(self) -> dict[str, PlannedTensor]:
        """The same in the number formats of the files (fp8 stays fp8, what stands in codes is bf16), to be written
        elsewhere."""
        return {name: file.planned(theirs) for name, (file, theirs) in self.places.items()}

    def exact(self) -> dict[str, PlannedTensor]:
        """Those that stand in codes, in fp32."""
        return {name: file.exact(theirs) for name, (file, theirs) in self.places.items() if theirs in file.coded}

    def raw(self) -> dict[str, PlannedTensor]:
        """All tensors of the files, byte for byte: those that scale others as well; GGUF's blocks in bf16."""
        return {name: file.raw(name) for file in self._files() for name in file.header.tensors}

    def scales(self) -> dict[str, tuple[PlannedTensor, str, PlannedTensor]]:
        """Those that stand in codes with a scale -> the codes, the scale's name and the scale."""
        return {
            name: (file.raw(theirs), name.removesuffix("weight") + of.scale.rpartition(".")[2], file.raw(of.scale))
            for name, (file, theirs) in self.places.items()
            if (of := file.coded.get(theirs)) and of.scale
        }

    def __getitem__(self, name: str) -> Tensor:
        file, theirs = self.places[name]
        kind = file.kind(theirs)
        asked = self.dtype if self.dtype is None or isinstance(self.dtype, torch.dtype) else self.dtype(name)
        wanted = asked or (torch.bfloat16 if kind in FP8 else None)
        if theirs not in file.coded and (wanted is None or kind not in FLOATS or files.torch_dtype(kind) == wanted):
            mapped = self.map(name) if callable(self.map) else self.map
            return file.mapped(theirs) if mapped else file.read(theirs)
        return file.read(theirs, wanted)

    def __contains__(self, name: object) -> bool:
        return name in self.places  # `Mapping` would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
