"""One table of names, read both ways.

A rule pairs a native name with foreign ones; `{i}` stands for a number. One foreign name is a rename;
several are the pieces of one native tensor, in order along its output rows. A rule for `a.b` also
carries `a.b.weight`, `a.b.bias` and whatever else stands below. A name that no rule claims is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.errors import UserError, nearest

AnyTensor = TypeVar("AnyTensor")
"""A tensor, or one that is yet to be made."""


@dataclass(frozen=True, slots=True)
class Change:
    """How a tensor's values differ between the two sides; `into` gives the native tensor, `back` the foreign one."""

    into: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    moves_rows: bool = False
    """Whether only rows change places; then the `lora_up` of a LoRA changes as the weight does."""
    computes: bool = False
    """Whether numbers become others, which are to be rounded once: it is given fp32."""


def _swap(t: Tensor) -> Tensor:
    return torch.cat(t.chunk(2)[::-1])


SWAP_HALVES = Change(_swap, _swap, moves_rows=True)
"""The two halves of the rows change places (scale and shift)."""
TRANSPOSE = Change(lambda t: t.T.contiguous(), lambda t: t.T.contiguous())
"""(in, out) on one side, (out, in) on the other."""
CONV_TO_LINEAR = Change(
    lambda t: t[:, :, 0, 0] if t.ndim == 4 else t, lambda t: t[:, :, None, None] if t.ndim == 2 else t
)
"""A 1x1 convolution on the foreign side, a linear layer on the native one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One native name, the foreign name or names that hold it, and how their values differ."""

    native: str
    foreign: tuple[str, ...]
    rows: tuple[int, ...] | None = None
    """Row counts of the pieces; None: equal parts."""
    change: Change | None = None


def rule(native: str, *foreign: str, rows: tuple[int, ...] | None = None, change: Change | None = None) -> Rule:
    """`Rule` with its foreign names spelled one after another; none: the same name on both sides."""
    return Rule(native, foreign or (native,), rows, change)


@dataclass(frozen=True, slots=True)
class Match:
    """A rule met by a name: the number that filled `{i}` and what stood below the rule's name."""

    rule: Rule
    i: str
    rest: str

    def native(self) -> str:
        return self.rule.native.replace("{i}", self.i) + self.rest

    def foreign(self) -> tuple[str, ...]:
        return tuple(f.replace("{i}", self.i) + self.rest for f in self.rule.foreign)


@lru_cache(1 << 16)
def _shape(name: str) -> str:
    """The name with every number blanked, by which rules are looked up."""
    return ".".join("#" if part == "{i}" or part.isdigit() else part for part in name.split("."))


class KeyMap:
    """Rules in both directions. Errors: `UserError` for a name without a rule or a rule without all its pieces."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules
        self._native: dict[str, list[tuple[re.Pattern[str], Rule]]] = {}
        self._foreign: dict[str, list[tuple[re.Pattern[str], Rule]]] = {}
        self._found: dict[tuple[str, bool], Match | None] = {}
        for r in rules:
            for table, names in ((self._native, (r.native,)), (self._foreign, r.foreign)):
                for name in names:
                    pattern = re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)"))
                    table.setdefault(_shape(name), []).append((pattern, r))

    def to_native(self, foreign: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Foreign tensors -> native ones; pieces are joined."""
        return dict(self.natives(foreign))

    def natives(self, foreign: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """`to_native`, one tensor after another: of a lazy mapping only those are read that the next one is made of."""
        left = dict.fromkeys(foreign)
        while left:
            key = next(iter(left))
            match = self.match(key, native=False)
            names = match.foreign()
            missing = [name for name in names if name not in left]
            if missing:
                raise UserError(f"tensor {key!r} comes without its other pieces: {', '.join(missing)}")
            for name in names:
                del left[name]
            value = foreign[key] if len(names) == 1 else torch.cat([foreign[name] for name in names])
            yield match.native(), match.rule.change.into(value) if match.rule.change else value

    def to_foreign(self, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native tensors -> foreign ones; a fused tensor is cut."""
        return dict(self.foreigns(native))

    def foreigns(self, native: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """`to_foreign`, one tensor after another."""
        for key in native:
            match, value = self.match(key, native=True), native[key]
            value = match.rule.change.back(value) if match.rule.change else value
            names = match.foreign()
            if len(names) == 1:
                yield names[0], value
                continue
            cuts = list(match.rule.rows) if match.rule.rows else [value.shape[0] // len(names)] * len(names)
            for name, piece in zip(names, torch.split(value, cuts), strict=True):
                yield name, piece.clone()

    def renames(self, name: str, *, native: bool) -> bool:
        """Whether nothing but the name of a tensor differs between the two sides."""
        match = self.match(name, native=native)
        return match.rule.change is None and len(match.foreign()) == 1

    def match(self, name: str, *, native: bool) -> Match:
        """The rule that claims a tensor's name or a module's path."""
        if found := self.find(name, native=native):
            return found
        known = [r.native if native else f for r in self.rules for f in r.foreign]
        raise UserError(f"no rule names the tensor {name!r}{nearest(name, known)}")

    def find(self, name: str, *, native: bool) -> Match | None:
        """`match`, or None where no rule claims the name. Remembered: a name is looked up again for its shape, its
        format and its values."""
        if (name, native) not in self._found:
            self._found[name, native] = self._search(name, self._native if native else self._foreign)
        return self._found[name, native]

    def _search(self, name: str, table: Mapping[str, list[tuple[re.Pattern[str], Rule]]]) -> Match | None:
        head = name
        while head:
            for pattern, r in table.get(_shape(head), ()):
                if m := pattern.fullmatch(head):
                    return Match(r, m.groupdict().get("i") or "", name[len(head) :])
            head = head.rpartition(".")[0]
        return None


def add_prefix(tensors: Mapping[str, AnyTensor], prefix: str) -> dict[str, AnyTensor]:
    """Every name with `prefix` before it."""
    return {prefix + name: t for name, t in tensors.items()}
