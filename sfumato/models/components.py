"""The nets of a model in files: a record a net says where it stands, and everything is read and written by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.lazy import FLOATS, Lazy
from sfumato.formats.names import KeyMap, add_prefix
from sfumato.models import locate
from sfumato.models.layers import Shapes
from sfumato.models.meta_init import check, fill, shapes

Config = Mapping[str, Any]
"""A part's `config.json`; empty for single files, which have none."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Spelling:
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

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The net's tensors under the file's names."""
        if self.keys is None:
            return dict(tensors)
        return self.keys.to_native(tensors) if self.inverse else self.keys.to_foreign(tensors)

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes by the net's names, from those of the file."""
        meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {name: tuple(t.shape) for name, t in self.read(meta)}


NATIVE = Spelling("native")


def natively(shapes: Shapes) -> Spelling:
    """Any names, taken as the net's own."""
    return NATIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A net of a model, and where files hold it."""

    name: str
    """The component's name: "denoiser", "clip_l", "vae"."""
    title: str
    """For messages: "the U-Net"."""
    net: Callable[[Shapes, Config], nn.Module]
    """A net without values (on the meta device) for native tensors of these shapes. Errors: `UserError`."""
    spelling: Callable[[Shapes], Spelling | None]
    """How tensors of these names (prefix off) and shapes are spelled; None: they are not this part's."""
    prefixes: tuple[str, ...] = ("",)
    """What stands before its names in files that hold several parts, the usual one first; "": it may stand bare."""
    folder: str = ""
    """Its folder in a diffusers folder."""
    flag: str = ""
    """The setting that names a file of its own; "": there is none."""
    idle: Callable[[Collection[str]], Collection[str]] = lambda names: ()
    """Of its names (prefix off) those that no net holds; in a single file they are kept as they are."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Those of `idle` that repeat the values of another name: copy -> original."""
    single: Callable[[Shapes], Spelling] | None = natively
    """How a new single file spells native tensors of these shapes; None: a new one does not hold this part."""
    diffusers: Callable[[Shapes], Spelling] = natively
    """How a diffusers folder spells them."""
    scaling: Callable[[Config], tuple[float, float]] | None = None
    """Of a VAE: factor and shift from its raw latents to the denoiser's, (x - shift) * factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A net as files hold it."""

    part: Part
    tensors: Lazy
    """Under the file's names, prefix off."""
    spelling: Spelling
    prefix: str | None
    """What stands before its names in a single file of the model; None: it has no place in one."""
    where: Path
    config: Config = field(default_factory=dict)
    alone: bool = False
    """Whether it comes from a file of its own, named by a setting."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by native name. Errors: `UserError` for names that the spelling does not know."""
        try:
            with locate.understood(self._what):
                return self.spelling.shapes(self.tensors.shapes)
        except UserError as error:
            raise UserError(*(f"{self._what}: {message}" for message in error.messages)) from None

    @property
    def _what(self) -> str:
        """For messages."""
        return f"{self.where} ({self.part.title})"

    def natives(self, dtype: torch.dtype | None = None, *, map: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(native name, tensor), one after another, floats cast to `dtype`; `map`: whether they may be backed by the file."""
        return self.spelling.read(self.tensors.cast(dtype, map=map and self.spelling.renames))

    def empty(self) -> nn.Module:
        """The net without values (on the meta device). Errors: `UserError` for tensors whose names or shapes do not fit it."""
        what, found = self._what, self.shapes()
        with locate.understood(what):
            net = self.part.net(found, self.config)
        check(net, found, what)
        self._check_formats(what)
        return net.eval().requires_grad_(False)

    def _check_formats(self, what: str) -> None:
        """That every tensor is in a format that a net's weights can be in."""
        kinds = {name: file.header.tensors[theirs].dtype for name, (file, theirs) in self.tensors.places.items()}
        wrong = [
            f"{what}: tensor {name!r} is in the format {kind}; weights are expected in {', '.join(FLOATS)}"
            for name, kind in kinds.items()
            if kind not in FLOATS
        ]
        if wrong:
            raise UserError(*wrong[:SHOWN], *([f"... and {len(wrong) - SHOWN} more such tensors"] if len(wrong) > SHOWN else []))

    def build(self, dtype: torch.dtype | None = None, read: Callable[[int], None] = lambda numbers: None, map: bool = True) -> nn.Module:
        """The net with its tensors, frozen and in eval mode. Names and shapes are checked before a value is read.

        `read` is told of each tensor how many numbers it has; `map`: whether tensors may be backed by the file.
        """
        return self.put_into(self.empty(), dtype, read, map)

    def put_into(
        self, net: nn.Module, dtype: torch.dtype | None = None, read: Callable[[int], None] = lambda numbers: None, map: bool = True
    ) -> nn.Module:
        """The tensors as those of a net that `empty` made."""
        tensors = {}
        for name, tensor in self.natives(dtype, map=map):
            tensors[name] = tensor
            read(tensor.numel())
        return fill(net, tensors, self._what)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a model was read from; its tensors are read when they are used."""

    path: Path
    held: Mapping[str, Held]
    """By component."""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of no net, under their full names in the single file; copied when one is saved."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """ "single_file" or "diffusers"."""
        return "diffusers" if self.path.is_dir() else "single_file"

    def check(self) -> None:
        """Errors: `UserError` if a file was changed since it was opened."""
        for tensors in self._lazy():
            tensors.check()

    def in_place(self) -> bool:
        """Whether all files still stand under their names."""
        return all(tensors.in_place() for tensors in self._lazy())

    def _lazy(self) -> list[Lazy]:
        return [*(held.tensors for held in self.held.values()), *([self.kept] if isinstance(self.kept, Lazy) else [])]


def matching(pattern: str) -> Callable[[Collection[str]], Collection[str]]:
    """For `Part.idle`: the names that a pattern matches whole."""
    compiled = re.compile(pattern)
    return lambda names: [name for name in names if compiled.fullmatch(name)]


# --- reading ---


def open_model(path: Path, parts: Sequence[Part], title: str, *, given: Mapping[str, str | None], kept: re.Pattern[str]) -> Source:
    """The parts of a single file or a diffusers folder, those in files of their own (`given`: flag -> path) put over them.

    `kept`: pattern of full names that belong to no net. Nothing but headers is read. Errors: `UserError` for tensors
    of no part, for missing files and for files that do not hold the part that they are named for.
    """
    with locate.understood(str(path)):
        source = _folder(path, parts) if path.is_dir() else _single(path, parts, title, kept)
    held = dict(source.held)
    for part in parts:
        if part.flag and (name := given.get(part.flag)):
            old = held.get(part.name)
            prefix = old.prefix if old else part.prefixes[0] if source.path.is_dir() and part.single else None
            held[part.name] = replace(open_part(part, name), prefix=prefix)
    return replace(source, held=held)


def _single(path: Path, parts: Sequence[Part], title: str, kept: re.Pattern[str]) -> Source:
    tensors = _file(path)
    locate.refuse_quantised(path, tensors)
    others = {name for name in tensors if kept.fullmatch(name)}
    left, held = tensors.only(lambda name: name not in others), {}
    for part, prefix in _by_prefix(parts):
        if part.name in held or not (mine := left.below(prefix)):
            continue
        idle = set(part.idle(list(mine)))
        used = mine.only(lambda name, idle=idle: name not in idle)  # type: ignore[misc]
        if spelling := part.spelling(used.shapes):
            held[part.name] = Held(part=part, tensors=used, spelling=spelling, prefix=prefix, where=path)
            others |= {prefix + name for name in idle}
            left = left.only(lambda name, prefix=prefix: not name.startswith(prefix))  # type: ignore[misc]
    if left:
        strange = list(left)
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        raise UserError(f"{path}: tensors that belong to no part of {title}: {', '.join(strange[:SHOWN])}{more}")
    return Source(path=path, held=held, kept=tensors.only(lambda n: n in others), metadata=files.read_header(path).metadata)


def _by_prefix(parts: Sequence[Part]) -> Iterator[tuple[Part, str]]:
    """Named places before bare ones, which take all that is left."""
    yield from ((part, prefix) for part in parts for prefix in part.prefixes if prefix)
    yield from ((part, "") for part in parts if "" in part.prefixes)


def _folder(path: Path, parts: Sequence[Part]) -> Source:
    held = {}
    for part in parts:
        if part.folder and (path / part.folder).is_dir():
            prefix = part.prefixes[0] if part.single else None
            held[part.name] = replace(_component(part, path / part.folder), prefix=prefix)
    return Source(path=path, held=held)


def _component(part: Part, folder: Path) -> Held:
    """A part in a folder of its own, with its config."""
    config = folder / "config.json"
    read = locate.read_json(config) if config.is_file() else {}
    return replace(_bare(part, Lazy.of(locate.weight_files(folder)), folder), config=read)


def open_part(part: Part, name: str) -> Held:
    """A part from a file of its own, from any file that holds it, from a folder or from the hub. Errors: `UserError` naming its flag."""
    path = locate.local(name, part.flag)
    with locate.understood(_asked(part, path)):
        return _opened(part, path)


def _opened(part: Part, path: Path) -> Held:
    if path.is_dir():
        inner = path / part.folder
        return replace(_component(part, inner if part.folder and inner.is_dir() else path), alone=True)
    tensors = _file(path, part)
    prefix = next((p for p in part.prefixes if p and any(n.startswith(p) for n in tensors)), "")
    return replace(_bare(part, tensors.below(prefix), path), alone=True)


def _file(path: Path, part: Part | None = None) -> Lazy:
    """The tensors of a file; `part`: what it is opened for. GGUF is told as such, not as a damaged file."""
    locate.refuse_quantised(_asked(part, path))
    return Lazy.of([path])


def _asked(part: Part | None, where: Path) -> str:
    """For messages: a file or folder, after the setting that named it."""
    return f"{part.flag}: {where}" if part and part.flag else str(where)


def _bare(part: Part, tensors: Lazy, where: Path) -> Held:
    locate.refuse_quantised(_asked(part, where), tensors)
    idle = set(part.idle(list(tensors)))
    used = tensors.only(lambda name: name not in idle)
    spelling = part.spelling(used.shapes)
    if spelling is None:
        first = ", ".join(repr(name) for name in list(tensors)[:2])
        raise UserError(f"{_asked(part, where)} does not hold {part.title} (its tensors: {len(tensors)}, {first} ...)")
    return Held(part=part, tensors=used, spelling=spelling, prefix=None, where=where)


def lacking(source: Source, parts: Sequence[Part]) -> list[str]:
    """A message for each part that is missing, with the setting that names it."""
    return [
        f"{source.path} holds no {part.title.removeprefix('the ')}; name its file with --{part.flag}"
        if part.flag
        else f"{source.path} holds no {part.title.removeprefix('the ')}"
        for part in parts
        if part.name not in source.held
    ]


# --- writing ---


def values(net: nn.Module | None, held: Held, instead: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Native tensors of a net as they are saved: those of the file, in its number formats (fp8 as bf16), where the net has their values
    or was never given any (None: was not even made)."""
    own = {**(net.state_dict() if net else {}), **instead}
    if net is None or any(t.is_meta for t in own.values()) or unchanged(own, held):
        own = dict(held.natives())
    return own if dtype is None else {name: t.to(dtype) if t.is_floating_point() else t for name, t in own.items()}


def unchanged(own: Mapping[str, Tensor], held: Held) -> bool:
    """Whether tensors are those of the file, but for their number format."""
    # Read anew: a net that was trained in the file's own format may share its memory with what was mapped before.
    read = held.spelling.read(held.tensors.cast(None, map=False))
    return all(torch.equal(own[name].cpu(), t.to(own[name].dtype)) for name, t in read)


def single_file(source: Source, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a single file as the source spells them, or as new ones are spelled. `parts`: native tensors by component."""
    out: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, tensors in parts.items():
        held = source.held[name]
        if held.prefix is None:
            continue
        spelling = held.spelling
        if (held.alone or source.path.is_dir()) and held.part.single is not None:
            spelling = held.part.single(shapes(tensors))
        out |= add_prefix(spelling.write(tensors), held.prefix)
        pairs = [(held.prefix + copy, held.prefix + original) for copy, original in held.part.copies.items()]
        copies |= {copy: out[original] for copy, original in pairs if copy in source.kept and original in out}
    return {**out, **source.kept, **copies}
