"""The settings of a run's adapters: which layers get one, and of which rank, alpha and rate. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from sfumato.adapters.base import Adapter, LayerOptions

DENOISER, TEXT = "denoiser", "text_encoders"
ALL, NONE = "all", "none"
"""Sets of layers that every component has."""
DEFAULT, CONVOLUTIONS = "linear", "conv"
"""Sets of layers that have adapters unless told otherwise: always, and with conv_dim."""


DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
"""Options that not every kind has (`Adapter.supports`)."""


class LayerNames(NamedTuple):
    """What a layer is called."""

    paths: tuple[str, ...]
    """Its module path; where sd-scripts' net has another, that too; each also with the component before it."""
    lora: str
    """Its name in kohya's files, "lora_unet_..."."""
    sets: frozenset[str] = frozenset()
    """The sets of layers that it is in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRule:
    """What some layers have of their own; None: as all others."""

    pattern: re.Pattern[str] | None = None
    """Matches a whole module path, or is found in kohya's name."""
    set: str = ""
    """In place of a pattern: the layers of this set."""
    rank: int | None = None
    """0: no adapter."""
    alpha: float | None = None
    rate: float | None = None
    """0: no adapter."""
    kind: type[Adapter] | None = None
    more: Mapping[str, Any] | None = None

    def matches(self, names: LayerNames) -> bool:
        if self.pattern is None:
            return self.set in names.sets
        return bool(_whole(self.pattern, names) or self.pattern.search(names.lora))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """Settings of a run's adapters, for all layers."""

    kind: type[Adapter]
    rank: int = 4
    alpha: float = 1.0
    conv_rank: int | None = None
    """Rank on convolutions larger than 1x1; None: no adapters on the "conv" targets."""
    conv_alpha: float = 1.0
    more: Mapping[str, Any] = field(default_factory=dict)
    """Dropouts and the kind's own options, by their names in `kind.Options`."""
    plus: float | None = None
    """LoRA+: factor on the rate of `loraplus_parameters`."""
    loraplus_denoiser: float | None = None
    """The same for the denoiser, in place of `plus`."""
    loraplus_encoders: float | None = None
    """The same for text encoders, in place of `plus`."""
    family: Any = None
    """The family's own network_args: an instance of its `Facts.network_args`."""
    targets: tuple[str, ...] = ()
    """Sets of layers that get adapters: SET, COMPONENT or COMPONENT.SET; none: the default ones."""
    targets_from: Literal["target", "preset", "preset file"] = "target"
    """Who named them: a set that a model does not have is a user's mistake, nothing, or worth a notice."""
    large: bool = True
    """Whether convolutions larger than 1x1 may have adapters."""
    include: tuple[re.Pattern[str], ...] = ()
    """Whole module paths of layers that get adapters besides, whatever `exclude` says."""
    exclude: tuple[re.Pattern[str], ...] = ()
    """Whole module paths of layers that get none."""
    rules: tuple[LayerRule, ...] = ()
    """The first that says something of a layer holds."""
    notices: tuple[str, ...] = ()
    """What was accepted and does nothing, and why."""

    def options(self, *, conv: bool) -> LayerOptions:
        """Settings of a layer's adapter; `conv`: a convolution larger than 1x1."""
        if conv:
            assert self.conv_rank is not None
            return self.kind.Options(rank=self.conv_rank, alpha=self.conv_alpha, **self.more)
        return self.kind.Options(rank=self.rank, alpha=self.alpha, **self.more)

    def kinds(self) -> frozenset[type[Adapter]]:
        """All kinds that layers may have."""
        return frozenset({self.kind, *(rule.kind for rule in self.rules if rule.kind)})

    def more_for(self, kind: type[Adapter]) -> Mapping[str, Any]:
        """Those of `more` that a kind has."""
        return {name: value for name, value in self.more.items() if name in _options(kind)}

    def loraplus_ratio(self, component: str) -> float | None:
        """LoRA+'s factor for a component; None: no LoRA+."""
        own = self.loraplus_denoiser if component == DENOISER else self.loraplus_encoders
        return self.plus if own is None else own

    def sets(self, component: str, has: Iterable[str]) -> tuple[str, ...]:
        """Those of the sets that a component `has` that get adapters; none: it is not trained."""
        known = {*has, ALL, NONE}
        default = (DEFAULT, *((CONVOLUTIONS,) if self.conv_rank else ()))
        more = self.family.sets() if component == DENOISER and self.family is not None else ()
        if not self.targets:
            return *default, *more
        found: dict[str, None] = {}
        for name in self.targets:
            where, _, part = name.partition(".")
            here = where == component or (where == TEXT and component != DENOISER)
            if here or name in known:
                chosen = default if here and not part else (part if here else name,)
                found |= dict.fromkeys(each for each in chosen if each in known)
        return (*found, *more) if found else ()

    def patterns(self, component: str, targets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        """Path patterns (fnmatch) of the layers of a component that get adapters. `targets`: its sets."""
        every = {ALL: ("*",), NONE: (), **targets}
        return tuple(pattern for name in self.sets(component, targets) for pattern in every.get(name, ()))

    def wants(self, names: LayerNames, *, named: bool) -> bool:
        """Whether a layer gets an adapter; `named`: it is among the targets."""
        if any(_whole(pattern, names) for pattern in self.include):
            return True
        return named and not any(_whole(pattern, names) for pattern in self.exclude)

    def own(self, what: Literal["rank", "alpha", "rate", "kind", "more"], names: LayerNames) -> Any:
        """What the rules say of a layer; None: nothing."""
        said = ((rule, getattr(rule, what)) for rule in self.rules)
        return next((value for rule, value in said if value is not None and rule.matches(names)), None)


def options_as(kind: type[Adapter], options: LayerOptions, more: Mapping[str, Any]) -> LayerOptions:
    """Options for another kind of adapter: those that it has, and `more`."""
    has = _options(kind)
    return kind.Options(**{f.name: getattr(options, f.name) for f in fields(options) if f.name in has} | dict(more))


def _options(kind: type[Adapter]) -> frozenset[str]:
    return frozenset(f.name for f in fields(kind.Options) if f.name not in DROPOUTS or f.name in kind.supports)


def _whole(pattern: re.Pattern[str], names: LayerNames) -> re.Match[str] | None:
    return next(filter(None, map(pattern.fullmatch, names.paths)), None)
