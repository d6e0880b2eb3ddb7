"""What a key of an adapter file names, in the spelling of whatever program wrote it.

Programs differ in what stands before a layer's path, in whether the path is the checkpoint's or diffusers', and in what
joins its parts. All of it follows from the paths of a net and the table to diffusers' names, so a family adds nothing.
The names of all layers are built and looked up; one whose dots became `_` is never split.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from sfumato.formats.dialect import Dialect, ModulePath
from sfumato.formats.names import KeyMap, Rule

DENOISER = "denoiser"
PREFIXES = {
    "lora_unet_": False,  # kohya, musubi-tuner, LyCORIS for kohya, OneTrainer for U-Nets
    "oft_unet_": False,  # kohya's OFT
    "lycoris_": True,  # LyCORIS' own wrapper, and with it SimpleTuner
    "lora_transformer_": True,  # OneTrainer, older ai-toolkit
    "diffusion_model.": False,  # ComfyUI, diffusion-pipe, OneTrainer, ai-toolkit
    "model.diffusion_model.": False,
    "net.": False,
    "transformer.": True,  # diffusers, SimpleTuner, ai-toolkit; OMI with the checkpoint's paths
    "unet.": True,
    "": False,  # bare names, of PEFT without a pipeline too
}
"""What stands before the path of a denoiser's layer -> whether diffusers' paths are looked for before the
checkpoint's."""
ENCODER_PREFIXES = (
    *("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "oft_te_", "oft_te1_", "oft_te2_", "t5.", ""),
    *("text_encoder.", "text_encoder_2.", "text_encoder_3."),
)
"""The same for text encoders: a number that the family gives to another one, or to none, names the only encoder that
has such a layer. (OneTrainer calls FLUX.1's T5 its second.)"""

_CHANGES = (
    (re.compile(r"^base_model\.model\."), ""),  # PEFT's own
    (re.compile(r"\.processor\."), "."),  # diffusers 0.16 to 0.19
    (re.compile(r"_lora\.(up|down)\.weight$"), r".lora_\1.weight"),
    (re.compile(r"\.lora_linear_layer\.(up|down)\.weight$"), r".lora_\1.weight"),
    (re.compile(r"\.(up|down)\.weight$"), r".lora_\1.weight"),
    (re.compile(r"\.lora\.lora_(up|down)\.weight$"), r".lora_\1.weight"),
    (re.compile(r"\.lora_(A|B|magnitude_vector)\.(?!weight$|bias$)[^.]+(?=\.(?:weight|bias)$|$)"), r".lora_\1"),
)
"""Older and longer ways of saying the same; the last is the name that PEFT gives to an adapter ("default")."""
_CHANGED = re.compile(
    r"^base_model\.|\.processor\.|_lora\.|\.(up|down)\.weight$|\.lora_(A|B|magnitude_vector)\.(?!weight$|bias$)"
)
"""Whether one of `_CHANGES` may have something to do: most names are as they should be."""


class Spelled(NamedTuple):
    """What a name stands for."""

    path: ModulePath
    piece: int
    """Of a fused layer, whose pieces have names of their own."""
    rule: Rule | None
    """By which the layer is cut, and its values differ; None: it is named as it is."""


class Spellings:
    """The layers of some nets, by every name that programs give them."""

    def __init__(self, dialects: Iterable[Dialect], paths: Iterable[ModulePath]) -> None:
        self.dialects = tuple(dialects)
        self.paths = list(paths)
        by_component: dict[str, list[str]] = {}
        for component, path in self.paths:
            by_component.setdefault(component, []).append(path)
        self._tables = {name: self._component(name, found) for name, found in by_component.items()}
        self._encoders = [name for name in by_component if name != DENOISER]
        self._prefixes = self._all_prefixes()

    def find(self, key: str) -> tuple[Spelled, str] | None:
        """What a key names, and its leaf ("lora_up.weight"); None: no layer, or more than one."""
        if _CHANGED.search(key):
            for pattern, to in _CHANGES:
                key = pattern.sub(to, key)
        for prefix, candidates in self._prefixes:
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            for tables in candidates:
                if found := _only(_lookup(table, rest) for table in tables):
                    return found
        return None

    def claimed(self, keys: Collection[str]) -> Iterator[tuple[str, tuple[Spelled, str] | None]]:
        """Each key of a file with what `find` says; a checkpoint's own weights and biases name nothing here."""
        for key in keys:
            # (IA)3, which has `on_input` too, calls its factors `weight`.
            beside = f"{key.removesuffix('weight')}on_input"
            if key.endswith(".weight") and beside in keys:
                named = self.find(beside)
                yield key, (named[0], "weight") if named else None
            else:
                named = self.find(key)
                yield key, None if named and named[1] in ("weight", "bias") else named

    def known(self) -> Iterator[str]:
        """The names of all layers in all dialects, for messages."""
        for dialect in self.dialects:
            for path in self.paths:
                if path[0] in dialect.prefix and dialect.holds(path):
                    yield from dialect.names(path)[0]

    def _component(self, component: str, paths: list[str]) -> list[tuple[KeyMap | None, _Table]]:
        """Its tables of names: by the checkpoint's paths, and by every other table that a dialect has."""
        foreign = {id(d.keys[component]): d.keys[component] for d in self.dialects if component in d.keys}
        tables: list[tuple[KeyMap | None, _Table]] = [(None, _natives(component, paths, foreign.values()))]
        return tables + [(keys, _foreigns(component, paths, keys)) for keys in foreign.values()]

    def _all_prefixes(self) -> list[tuple[str, list[list[_Table]]]]:
        """(prefix, groups of tables), the longest prefix first: of the first group that knows a name, one alone may."""
        groups: dict[str, list[list[_Table]]] = {}
        for dialect in self.dialects:
            for component, prefix in dialect.prefix.items():
                if component in self._tables:
                    groups.setdefault(prefix, []).extend(self._ordered(component, dialect.keys.get(component)))
        if DENOISER in self._tables:
            for prefix, diffusers in PREFIXES.items():
                tables = self._ordered(DENOISER, None)
                groups.setdefault(prefix, []).extend(reversed(tables) if diffusers else tables)
        named = (f"{name}." for name in self._encoders)
        bundled = (f"text_encoders.{name}.transformer." for name in self._encoders)
        for prefix in (*ENCODER_PREFIXES, *named, *bundled):
            each = [self._ordered(name, None)[0][0] for name in self._encoders]
            own = [t for name, t in zip(self._encoders, each, strict=True) if f"{name}." in f".{prefix}"]
            groups.setdefault(prefix, []).extend(([own] if own else []) + [each])
        return sorted(groups.items(), key=lambda item: -len(item[0]))

    def _ordered(self, component: str, first: KeyMap | None) -> list[list[_Table]]:
        """A component's tables, one a group, that of `first` before the others."""
        tables = self._tables[component]
        return [[table] for _, table in sorted(tables, key=lambda item: item[0] is not first)]


_Table = dict[str, Spelled]


def _natives(component: str, paths: Iterable[str], tables: Iterable[KeyMap]) -> _Table:
    """By the checkpoint's paths; the pieces of a fused layer by their numbers (OneTrainer's OMI: "qkv.0")."""
    out: _Table = {}
    for path in paths:
        _add(out, path, Spelled((component, path), 0, None))
        if component != DENOISER:  # transformers has dropped this part
            _add(out, path.removeprefix("text_model."), Spelled((component, path), 0, None))
        for keys in tables:
            if (match := keys.find(path, native=True)) and len(match.rule.foreign) > 1:
                whole = replace(match.rule, change=None)
                for i in range(len(match.rule.foreign)):
                    _add(out, f"{path}.{i}", Spelled((component, path), i, whole))
                break
    return out


def _foreigns(component: str, paths: Iterable[str], keys: KeyMap) -> _Table:
    """By the names of another program, as far as its table has them."""
    out: _Table = {}
    for path in paths:
        if match := keys.find(path, native=True):
            for i, name in enumerate(match.foreign()):
                _add(out, name, Spelled((component, path), i, match.rule))
                if name.endswith(".to_out.0"):  # diffusers 0.16 to 0.19
                    _add(out, name.removesuffix(".0"), Spelled((component, path), i, match.rule))
    return out


def _add(table: _Table, name: str, spelled: Spelled) -> None:
    for each in (name, name.replace(".", "_")):
        known = table.setdefault(each, spelled)
        if known.path != spelled.path:
            raise ValueError(f"{each!r} names both {known.path} and {spelled.path}")


def _lookup(table: Mapping[str, Spelled], rest: str) -> tuple[Spelled, str] | None:
    """What the longest known name that `rest` begins with stands for, and the leaf."""
    name = rest
    while name := name.rpartition(".")[0]:
        if spelled := table.get(name):
            return spelled, rest[len(name) + 1 :]
    return None


def _only(found: Iterable[tuple[Spelled, str] | None]) -> tuple[Spelled, str] | None:
    """What was found, if it was found once."""
    hits = [each for each in found if each]
    return hits[0] if len(hits) == 1 else None
