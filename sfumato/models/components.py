"""The nets of a model in files: one record per net, by which it is found, read and written."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters.merging import Change
from sfumato.errors import UserError
from sfumato.formats import files, gguf
from sfumato.formats.coded import FP8
from sfumato.formats.lazy import FLOATS, Lazy
from sfumato.formats.names import KeyMap
from sfumato.formats.planned import PlannedTensor, Writable, made, renamed
from sfumato.memory.quantise import Stored
from sfumato.models import kept, locate
from sfumato.models.detection import PREFIX, Shapes
from sfumato.models.key_formats import NATIVE, KeyFormat, native_format
from sfumato.models.meta_init import check, fill

Config = Mapping[str, Any]
"""A component's `config.json`; empty for single files, which have none."""
Scaling = tuple[float | Tensor, float | Tensor]
"""Factor and shift from a VAE's raw latents to the denoiser's, (x - shift) * factor: numbers, or (c, 1, 1) in fp32."""
SHOWN = 5
COARSE = [files.torch_dtype(kind) for kind in FP8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A net of a model, and where files hold it."""

    name: str
    """The component's name: "denoiser", "clip_l", "vae"."""
    title: str
    """For messages: "the U-Net"."""
    net: Callable[[Shapes, Config], nn.Module]
    """A net without values (on the meta device) for native tensors of these shapes. Errors: `UserError`."""
    key_format: Callable[[Shapes], KeyFormat | None]
    """The key format of tensors of these names (prefix off) and shapes; None: they are not this component's."""
    prefixes: tuple[str, ...] = ("",)
    """What stands before its names in files that hold several components, the usual one first; "": it may stand
    bare."""
    folder: str = ""
    """Its folder in a diffusers folder."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Further folders there that hold parts of it -> what stands before these parts' names in `diffusers`."""
    flag: str = ""
    """The setting that names a file of its own; "": there is none."""
    unused_keys: Callable[[Collection[str]], Collection[str]] = lambda names: ()
    """Of its names (prefix off) those that no net has; in a single file they are copied on save."""
    carried_keys: Mapping[str, str] = field(default_factory=dict)
    """Patterns of those of `unused_keys` that go with the net into a diffusers folder or another single file -> their
    names there, as `re.sub` makes them."""
    tied_keys: Mapping[str, str] = field(default_factory=dict)
    """Those of `unused_keys` that repeat the values of another name: copy -> original."""
    single: Callable[[Shapes], KeyFormat] = native_format
    """The key format of a new single file."""
    bundled: bool = True
    """Whether a new single file holds it, if nothing else is asked for."""
    diffusers: Callable[[Shapes], KeyFormat] = native_format
    """The key format of a diffusers folder."""
    scaling: Callable[[Config], Scaling] | None = None
    """Of a VAE."""


def denoiser(
    net: Callable[[Shapes, Config], nn.Module],
    keys: Callable[[Shapes], KeyMap],
    *,
    native: str,
    diffusers: str,
    prefixes: tuple[str, ...] = (PREFIX, ""),
    title: str = "the transformer",
    folder: str = "transformer",
) -> Component:
    """A denoiser, whose own names are those of single files.

    `keys`: the table to diffusers' names, for tensors of these names and shapes, native ones or diffusers'.
    `native`, `diffusers`: a tensor by which a file in these names is known; the latter is looked for first.
    """

    def diffusers_format(shapes: Shapes) -> KeyFormat:
        return KeyFormat("diffusers", keys(shapes))

    return Component(
        name="denoiser",
        title=title,
        prefixes=prefixes,
        folder=folder,
        net=net,
        key_format=lambda shapes: (
            diffusers_format(shapes) if diffusers in shapes else NATIVE if native in shapes else None
        ),
        diffusers=diffusers_format,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentWeights:
    """A net as files hold it."""

    component: Component
    tensors: Lazy
    """Under the file's names, prefix off."""
    key_format: KeyFormat
    prefix: str | None
    """What stands before its names in a single file of the model; None: it has no place in one."""
    where: Path
    config: Config = field(default_factory=dict)
    alone: bool = False
    """Whether it comes from a file of its own, named by a setting."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    """Native name -> what is merged into this tensor whenever it is read."""
    unused: Lazy | None = None
    """What the files hold of it that no net has, prefix off."""
    quantise: Callable[[nn.Module], Mapping[str, Stored]] = lambda net: {}
    """Has layers of the net store their weights in fewer bits: their paths, and the layers."""

    def carried(self) -> dict[str, Writable]:
        """What a diffusers folder, or another single file, holds of it besides the net, as it is stored."""
        held = {} if self.unused is None else self.unused.as_stored()
        names = {
            name: (p, to) for p, to in self.component.carried_keys.items() for name in held if re.fullmatch(p, name)
        }
        return {re.sub(*by, name): held[name] for name, by in names.items()}

    def unmerged(self) -> ComponentWeights:
        """The same as the file has it, with nothing merged."""
        return replace(self, changes={})

    def part(self, names: Collection[str]) -> ComponentWeights:
        """The same with tensors of these native names alone, and what else their tensors in the file are made into."""
        wanted = {source for name in names for source in self.key_format.sources(name)}
        return replace(self, tensors=self.tensors.only(wanted.__contains__))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by native name. Errors: `UserError` for names that the key format does not know."""
        with self._named():
            return self.key_format.shapes(self.tensors.shapes)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Around what reads names, shapes and config: its errors say whose these are."""
        what = self._what
        try:
            with locate.understood(what):
                yield
        except UserError as error:
            raise UserError(*(m if m.startswith(what) else f"{what}: {m}" for m in error.messages)) from None

    @property
    def _what(self) -> str:
        """For messages."""
        return f"{self.where} ({self.component.title})"

    def natives(
        self, dtype: torch.dtype | None = None, *, map: bool = True, as_is: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """(native name, tensor), one after another, floats cast to `dtype`, what is merged rounded once; `map`: whether
        they may be backed by the file. `as_is`: names of those that are not cast, and what is merged into them is not
        rounded; they are not backed by the file."""

        def stands(names: Collection[str]) -> set[str]:
            return {source for name in names for source in self.key_format.sources(name)}

        raw = stands(as_is)
        exact = stands(self.changes) | {name for name in self.tensors if self.key_format.computes(name)}
        exact |= raw & self.tensors.coded.keys()
        tensors = self.tensors.cast(
            lambda name: torch.float32 if name in exact and (dtype or name in raw) else None if name in raw else dtype,
            map=lambda name: map and name not in exact and name not in raw and self.key_format.renames(name),
        )
        for name, tensor in self.key_format.read(tensors):
            cast = dtype if tensor.is_floating_point() and name not in as_is else None
            kept = cast or tensor.dtype
            yield name, self.changes[name](tensor, kept) if name in self.changes else tensor.to(kept)

    def stored(self) -> dict[str, Writable]:
        """The tensors by native name, each read when it is made: in the number formats of the files, those that stand
        in codes in fp32."""
        return renamed(self.key_format.read, {**self.tensors.as_stored(), **self.tensors.exact()})

    def coded(self) -> set[str]:
        """Native names of those that stand in codes."""
        codes = self.tensors.coded.keys()
        return {name for name in self.shapes() if codes & set(self.key_format.sources(name))} if codes else set()

    def planned(self, dtype: torch.dtype | None = None, coded: torch.dtype = torch.bfloat16) -> dict[str, Writable]:
        """`stored`, with what is merged; in `dtype`, or in the number formats of the files (fp8 as bf16, codes as
        `coded`)."""
        found, codes = self.stored(), self.coded()

        def kept(name: str, held: torch.dtype) -> torch.dtype:
            return dtype or (coded if name in codes else torch.bfloat16 if held in COARSE else held)

        return {name: self.with_change(name, t, kept(name, t.dtype)) for name, t in found.items()}

    def with_change(self, name: str, tensor: Writable, dtype: torch.dtype) -> Writable:
        """A native tensor in a number format, with what is merged into it, rounded once."""
        change = self.changes.get(name)
        if change is None or not tensor.dtype.is_floating_point:
            return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor
        return PlannedTensor(dtype, tuple(tensor.shape), lambda: change(made(tensor), dtype))

    def empty(self) -> nn.Module:
        """The net without values (on the meta device). Errors: `UserError` for tensors whose names or shapes do not fit
        it."""
        what, found = self._what, self.shapes()
        with self._named():
            net = self.component.net(found, self.config)
        check(net, found, what)
        self._check_formats(what)
        return net.eval().requires_grad_(False)

    def _check_formats(self, what: str) -> None:
        """That every tensor is in a format that a net's weights can be in."""
        wrong = [
            f"{what}: tensor {name!r} is in the format {kind}; weights are expected in {', '.join(FLOATS)}"
            for name, kind in self.tensors.kinds.items()
            if kind not in FLOATS
        ]
        if wrong:
            raise UserError(
                *wrong[:SHOWN], *([f"... and {len(wrong) - SHOWN} more such tensors"] if len(wrong) > SHOWN else [])
            )

    def build(
        self, dtype: torch.dtype | None = None, read: Callable[[int], None] = lambda numbers: None, map: bool = True
    ) -> nn.Module:
        """The net with its tensors, frozen and in eval mode. Names and shapes are checked before a value is read.

        `read` is called with the size of each tensor; `map`: whether tensors may be backed by the file.
        """
        return self.put_into(self.empty(), dtype, read, map)

    def put_into(
        self,
        net: nn.Module,
        dtype: torch.dtype | None = None,
        read: Callable[[int], None] = lambda numbers: None,
        map: bool = True,
    ) -> nn.Module:
        """The tensors as those of a net that `empty` made; layers that store theirs in fewer bits do so at once: as the
        file has them, if that is their format."""
        layers = {f"{path}.weight": layer for path, layer in self.quantise(net).items()}
        same = {name: layer for name, layer in layers.items() if name not in self.changes}
        held = kept.put(self.tensors, self.key_format, same, dtype or torch.bfloat16, read)
        left = {name: layer for name, layer in same.items() if name not in held}
        held |= kept.quantise_rows(self.tensors, self.key_format, left, dtype, read)
        tensors, rest = {}, self.part(self.shapes().keys() - held) if held else self
        for name, tensor in rest.natives(dtype, map=map, as_is=layers):
            if name in layers:
                layers[name].put(tensor, dtype)
            else:
                tensors[name] = tensor
            read(tensor.numel())
        return fill(net, tensors, self._what)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a model was read from; its tensors are read when they are used."""

    path: Path
    components: Mapping[str, ComponentWeights]
    """By component."""
    passthrough: Mapping[str, Tensor] = field(default_factory=dict)
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
        return [
            *(weights.tensors for weights in self.components.values()),
            *([self.passthrough] if isinstance(self.passthrough, Lazy) else []),
        ]


def matching(pattern: str) -> Callable[[Collection[str]], Collection[str]]:
    """For `Component.unused_keys`: the names that a pattern matches whole."""
    compiled = re.compile(pattern)
    return lambda names: [name for name in names if compiled.fullmatch(name)]


def check_config(config: Config, expected: Mapping[str, Any]) -> None:
    """Errors: `UserError` for each thing in which a net's config asks for another net than its tensors make."""
    if wrong := [
        f"config.json: {k} is {config[k]!r}; {v!r} was expected" for k, v in expected.items() if config.get(k, v) != v
    ]:
        raise UserError(*wrong)


# --- reading ---


def open_model(
    path: Path,
    components: Sequence[Component],
    title: str,
    *,
    given: Mapping[str, str | None],
    passthrough_keys: re.Pattern[str],
) -> Checkpoint:
    """The components of a single file or a diffusers folder, those in files of their own (`given`: flag -> path) put
    over them.

    `passthrough_keys`: pattern of full names that belong to no net. Nothing but headers is read. Errors: `UserError`
    for tensors of no component, for missing files and for files that do not hold the component that they are named for.
    """
    with locate.understood(str(path)):
        source = _folder(path, components) if path.is_dir() else _single(path, components, title, passthrough_keys)
    found = dict(source.components)
    for component in components:
        if component.flag and (name := given.get(component.flag)):
            old = found.get(component.name)
            prefix = (
                old.prefix if old else component.prefixes[0] if source.path.is_dir() and component.bundled else None
            )
            found[component.name] = replace(open_component(component, name), prefix=prefix)
    return replace(source, components=found)


def _single(path: Path, components: Sequence[Component], title: str, passthrough_keys: re.Pattern[str]) -> Checkpoint:
    tensors = Lazy.of([path])
    locate.refuse_quantised(path, tensors)
    others = {name for name in tensors if passthrough_keys.fullmatch(name)}
    left, found = tensors.only(lambda name: name not in others), {}
    for component, prefix in _by_prefix(components):
        if component.name in found or not (mine := left.below(prefix)):
            continue
        unused = set(component.unused_keys(list(mine)))
        used = mine.only(lambda name, unused=unused: name not in unused)  # type: ignore[misc]
        if key_format := component.key_format(used.shapes):
            found[component.name] = ComponentWeights(
                component=component, tensors=used, key_format=key_format, prefix=prefix, where=path,
                unused=mine.only(lambda name, unused=unused: name in unused),  # type: ignore[misc]
            )  # fmt: skip
            others |= {prefix + name for name in unused}
            left = left.only(lambda name, prefix=prefix: not name.startswith(prefix))  # type: ignore[misc]
    if left:
        strange = list(left)
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        raise UserError(f"{path}: tensors that belong to no part of {title}: {', '.join(strange[:SHOWN])}{more}")
    return Checkpoint(
        path=path,
        components=found,
        passthrough=tensors.only(lambda n: n in others),
        metadata={} if gguf.is_gguf(path) else files.read_header(path).metadata,
    )


def _by_prefix(components: Sequence[Component]) -> Iterator[tuple[Component, str]]:
    """Named places before bare ones, which take all that is left."""
    yield from ((component, prefix) for component in components for prefix in component.prefixes if prefix)
    yield from ((component, "") for component in components if "" in component.prefixes)


def _folder(path: Path, components: Sequence[Component]) -> Checkpoint:
    found = {}
    for component in components:
        if component.folder and (path / component.folder).is_dir():
            prefix = component.prefixes[0] if component.bundled else None
            found[component.name] = replace(_component(component, path / component.folder), prefix=prefix)
    return Checkpoint(path=path, components=found)


def _component(component: Component, folder: Path) -> ComponentWeights:
    """A component in a folder of its own, with its config."""
    config = folder / "config.json"
    read = locate.read_json(config) if config.is_file() else {}
    tensors = Lazy.of(locate.weight_files(folder))
    for name, prefix in component.beside.items():
        tensors = tensors.beside(prefix, Lazy.of(locate.weight_files(folder.parent / name)))
    return replace(_bare(component, tensors, folder), config=read)


def open_component(component: Component, name: str) -> ComponentWeights:
    """A component from a file of its own, from any file that holds it, from a folder or from the hub. Errors:
    `UserError` naming its flag."""
    path = locate.local(name, component.flag)
    with locate.understood(_asked(component, path)):
        return _opened(component, path)


def _opened(component: Component, path: Path) -> ComponentWeights:
    if path.is_dir():
        inner = path / component.folder
        return replace(_component(component, inner if component.folder and inner.is_dir() else path), alone=True)
    tensors = Lazy.of([path])
    prefix = next((p for p in component.prefixes if p and any(n.startswith(p) for n in tensors)), "")
    return replace(_bare(component, tensors.below(prefix), path), alone=True)


def _asked(component: Component | None, where: Path) -> str:
    """For messages: a file or folder, after the setting that named it."""
    return f"{component.flag}: {where}" if component and component.flag else str(where)


def _bare(component: Component, tensors: Lazy, where: Path) -> ComponentWeights:
    locate.refuse_quantised(_asked(component, where), tensors)
    unused = set(component.unused_keys(list(tensors)))
    used = tensors.only(lambda name: name not in unused)
    key_format = component.key_format(used.shapes)
    if key_format is None:
        first = ", ".join(repr(name) for name in list(tensors)[:2])
        raise UserError(
            f"{_asked(component, where)} does not hold {component.title} (its tensors: {len(tensors)}, {first} ...)"
        )
    left = tensors.only(lambda name: name in unused)
    return ComponentWeights(
        component=component, tensors=used, key_format=key_format, prefix=None, where=where, unused=left
    )


def lacking(source: Checkpoint, components: Sequence[Component]) -> list[str]:
    """A message for each component that is missing, with the setting that names it."""
    return [
        f"{source.path} holds no {component.title.removeprefix('the ')}; name its file with --{component.flag}"
        if component.flag
        else f"{source.path} holds no {component.title.removeprefix('the ')}"
        for component in components
        if component.name not in source.components
    ]
