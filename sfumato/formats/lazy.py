"""Tensors that stay in their files until they are asked for, so that a checkpoint is never in memory twice."""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import files, scaled_fp8
from sfumato.formats.planned import PlannedTensor
from sfumato.formats.scaled_fp8 import STORED

_log = logging.getLogger(__name__)
FLOATS = ("F64", "F32", "F16", "BF16", *STORED)
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
        self.scales = scaled_fp8.scales(self.header.tensors)
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
        return self.header.tensors.keys() - scaled_fp8.companions(self.header.tensors)

    def mapped(self, name: str) -> Tensor:
        """The tensor, backed by the file itself."""
        self.check()
        if self._pickled is not None:
            return self._pickled[name]
        if self._mapped is None and self.in_place():
            self._mapped = files.mapped(self.path)
        if self._mapped is None:
            return self.read(name)
        tensor: Tensor = self._mapped.get_tensor(name)
        return tensor

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, cast to `dtype`; no page of the file stays mapped, and no second copy is
        ever whole, but of a weight that has a scale (whose format is bf16, if no other is asked for)."""
        if name in self.scales:
            scale = self._read(self.scales[name])
            return scaled_fp8.widened(self._read(name), scale, dtype or torch.bfloat16)
        return self._read(name, dtype)

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

    def planned(self, name: str) -> PlannedTensor:
        """The tensor as it stands in the file (with a scale: in bf16), read each time that it is made."""
        info = self.header.tensors[name]
        dtype = torch.bfloat16 if name in self.scales else files.torch_dtype(info.dtype)
        return PlannedTensor(dtype, info.shape, lambda: self.read(name))

    def raw(self, name: str) -> PlannedTensor:
        """The tensor byte for byte."""
        info = self.header.tensors[name]
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
class Lazy(Mapping[str, Tensor]):
    """{name: tensor}, each read when it is asked for. Names and shapes are known from the headers."""

    places: Mapping[str, tuple[_File, str]]
    """name -> file, and the tensor's name there."""
    dtype: torch.dtype | Callable[[str], torch.dtype | None] | None = None
    """What floating tensors, or that of this name, are cast to as they are read; None: as in the file, fp8 as bf16."""
    map: bool | Callable[[str], bool] = True
    """Whether a tensor, or that of this name, that is wanted as it stands may be backed by the file; False where it is
    copied anyway."""

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Lazy:
        """All tensors of some files: one, or the shards of one; weights in fp8 that have scales are read with them.
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
        return sorted({file.path.resolve() for file, _ in self.places.values()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape}"""
        return {name: file.header.tensors[theirs].shape for name, (file, theirs) in self.places.items()}

    @property
    def scaled(self) -> set[str]:
        """Those that stand in fp8 with a scale."""
        return {name for name, (file, theirs) in self.places.items() if theirs in file.scales}

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

    def as_stored(self) -> dict[str, PlannedTensor]:
        """The same in the number formats of the files (fp8 stays fp8), to be written elsewhere."""
        return {name: file.planned(theirs) for name, (file, theirs) in self.places.items()}

    def raw(self) -> dict[str, PlannedTensor]:
        """All tensors of the files, byte for byte: those that scale others as well."""
        return {name: file.raw(name) for file in self._files() for name in file.header.tensors}

    def scales(self) -> dict[str, tuple[PlannedTensor, str, PlannedTensor]]:
        """Those that stand in fp8 with a scale -> the weight as it stands there, the scale's name and the scale."""
        return {
            name: (file.raw(theirs), name.removesuffix("weight") + scale.rpartition(".")[2], file.raw(scale))
            for name, (file, theirs) in self.places.items()
            if (scale := file.scales.get(theirs))
        }

    def __getitem__(self, name: str) -> Tensor:
        file, theirs = self.places[name]
        kind = file.header.tensors[theirs].dtype
        asked = self.dtype if self.dtype is None or isinstance(self.dtype, torch.dtype) else self.dtype(name)
        wanted = asked or (torch.bfloat16 if kind in STORED else None)
        if theirs in file.scales:
            return file.read(theirs, wanted)
        if wanted is None or kind not in FLOATS or files.torch_dtype(kind) == wanted:
            mapped = self.map(name) if callable(self.map) else self.map
            return file.mapped(theirs) if mapped else file.read(theirs)
        return file.read(theirs, wanted)

    def __contains__(self, name: object) -> bool:
        return name in self.places  # `Mapping` would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
