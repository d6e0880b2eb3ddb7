"""Tensors that stay in their files until they are asked for, so that a checkpoint is never in memory twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import files

STORED = ("F8_E4M3", "F8_E5M2")
"""Formats that nothing is computed in; bf16 holds their values exactly."""
FLOATS = ("F64", "F32", "F16", "BF16", *STORED)
PIECE = 1 << 16
"""Numbers that are read at once where they are cast; buffers of some MB leave holes in the heap, a tenth of a model in all."""


class _File:
    """An open weight file."""

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, files.read_header(path)
        files.check_known(path, self.header)
        self._pickled = files.load(path) if path.suffix in files.PICKLES else None
        self._handle: Any = None

    def mapped(self, name: str) -> Tensor:
        """The tensor, backed by the file itself."""
        if self._pickled is not None:
            return self._pickled[name]
        if self._handle is None:
            self._handle = files.mapped(self.path)
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, cast to `dtype`; no page of the file stays mapped, and no second copy is ever whole."""
        if self._pickled is not None:
            return self._pickled[name].to(dtype, copy=True)
        info = self.header.tensors[name]
        kind = files.torch_dtype(info.dtype)
        values = torch.empty(math.prod(info.shape), dtype=dtype or kind)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.header.size + info.start)
            if values.dtype == kind:
                self._fill(file, values, name)
            else:
                buffer = torch.empty(min(PIECE, len(values)), dtype=kind)
                for piece in torch.split(values, PIECE):
                    self._fill(file, buffer[: len(piece)], name)
                    piece.copy_(buffer[: len(piece)])
        return values.view(info.shape)

    def _fill(self, file: FileIO, values: Tensor, name: str) -> None:
        """The next bytes of the file as these values."""
        view, at = values.view(torch.uint8).numpy().data, 0
        while at < len(view):
            got = file.readinto(view[at:])
            if not got:
                raise UserError(f"{self.path}: truncated since it was opened: it ends within {name!r}; download or copy it again")
            at += got


@dataclass(frozen=True, slots=True)
class Lazy(Mapping[str, Tensor]):
    """{name: tensor}, each read when it is asked for. Names and shapes are known from the headers."""

    places: Mapping[str, tuple[_File, str]]
    """name -> file, and the tensor's name there."""
    dtype: torch.dtype | None = None
    """What floating tensors are cast to as they are read; None: as in the file, fp8 as bf16."""
    map: bool = True
    """Whether a tensor that is wanted as it stands may be backed by the file; False where it is copied anyway."""

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Lazy:
        """All tensors of some files: one, or the shards of one. Errors: `UserError` as `files.read_header`."""
        opened = [_File(path) for path in paths]
        return cls({name: (file, name) for file in opened for name in file.header.tensors})

    @property
    def paths(self) -> list[Path]:
        """The files that hold them."""
        return sorted({file.path.resolve() for file, _ in self.places.values()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape}"""
        return {name: file.header.tensors[theirs].shape for name, (file, theirs) in self.places.items()}

    def below(self, prefix: str) -> Lazy:
        """Those whose names start with `prefix`, without it."""
        return Lazy({n[len(prefix) :]: place for n, place in self.places.items() if n.startswith(prefix)}, self.dtype, self.map)

    def only(self, wanted: Callable[[str], bool]) -> Lazy:
        """Those whose names are wanted."""
        return Lazy({n: place for n, place in self.places.items() if wanted(n)}, self.dtype, self.map)

    def cast(self, dtype: torch.dtype | None, *, map: bool = True) -> Lazy:
        """The same tensors, read in another number format."""
        return Lazy(self.places, dtype, map)

    def __getitem__(self, name: str) -> Tensor:
        file, theirs = self.places[name]
        kind = file.header.tensors[theirs].dtype
        wanted = self.dtype or (torch.bfloat16 if kind in STORED else None)
        if wanted is None or kind not in FLOATS or files.torch_dtype(kind) == wanted:
            return file.mapped(theirs) if self.map else file.read(theirs)
        return file.read(theirs, wanted)

    def __contains__(self, name: object) -> bool:
        return name in self.places  # `Mapping` would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
