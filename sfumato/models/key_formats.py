"""How files name the tensors of a net."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.formats.names import KeyMap
from sfumato.formats.planned import Writable, renamed
from sfumato.models.detection import Shapes


@dataclass(frozen=True, slots=True)
class KeyFormat:
    """How a file names a net's tensors."""

    name: str
    """"native", "diffusers", "openclip" ..."""
    keys: KeyMap | None = None
    """None: as the net does."""
    inverse: bool = False
    """Whether the net's names are the table's foreign side."""

    def read(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The file's tensors under the net's names, one after another."""
        if self.keys is None:
            return iter(tensors.items())
        return self.keys.foreigns(tensors) if self.inverse else self.keys.natives(tensors)

    def renames(self, name: str) -> bool:
        """Whether a tensor of the file is the net's as it stands, under whatever name."""
        return self.keys is None or self.keys.renames(name, native=self.inverse)

    def computes(self, name: str) -> bool:
        """Whether numbers of a tensor of the file become others in the net."""
        change = self.keys and self.keys.match(name, native=self.inverse).rule.change
        return bool(change and change.computes)

    def sources(self, name: str) -> tuple[str, ...]:
        """The file's names of what a tensor of the net is made of."""
        if self.keys is None:
            return (name,)
        match = self.keys.match(name, native=not self.inverse)
        return (match.native(),) if self.inverse else match.foreign()

    def pieces(self, name: str) -> tuple[tuple[str, ...], Callable[[Tensor], Tensor] | None] | None:
        """The file's tensors whose rows, one after another, are a native tensor's, and how these change places; None:
        it is made in another way."""
        if self.keys is None:
            return (name,), None
        match = self.keys.match(name, native=not self.inverse)
        change = match.rule.change
        if (self.inverse and len(match.foreign()) > 1) or (change and not change.moves_rows):
            return None
        return self.sources(name), (change.back if self.inverse else change.into) if change else None

    def write(self, tensors: Mapping[str, Writable]) -> dict[str, Writable]:
        """The net's tensors under the file's names."""
        if self.keys is None:
            return dict(tensors)
        return renamed(self.keys.natives if self.inverse else self.keys.foreigns, tensors)

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes by the net's names, from those of the file."""
        meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {name: tuple(t.shape) for name, t in self.read(meta)}


NATIVE = KeyFormat("native")


def native_format(shapes: Shapes) -> KeyFormat:
    """Any names, taken as the net's own."""
    return NATIVE
