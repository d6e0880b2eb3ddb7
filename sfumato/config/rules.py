"""The rules that stand with a setting, in `Annotated` beside its type, and what checks a value against them.

Ranges are annotated-types' own (`Ge`, `Gt`, `Interval`), which pydantic reads as well. `Needs`, `Excludes` and `Only`
say beside which other settings one acts; the names and values in them are checked at the import (`check_names`). What
relates several settings otherwise is an `Idle` or a `Clash`, a typed function of all `Settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.config.run import Method, Settings

LARGEST = 2**63 - 1
"""No whole number is larger: further on, nothing can count."""


@dataclass(frozen=True, slots=True)
class Must:
    """A test that a value must pass."""

    test: Callable[[Any], object]
    expected: str
    """What was expected, for the message."""


@dataclass(frozen=True, slots=True)
class PathTo:
    """The text is a path, and what is there. "new folder": made where it is missing; "weights": a file, a folder or a
    hub id; "state": a folder, or `auto`."""

    what: Literal["file", "folder", "new folder", "weights", "state"]


@dataclass(frozen=True, slots=True)
class ZeroIsOff:
    """Kohya's files write 0 where nothing is meant, and its scripts take 0 for off: it is read as None."""


class Needs:
    """The setting acts only where one of `names` is switched on, or has one of the values `among`."""

    def __init__(self, *names: str, among: Collection[str] = (), method: Method | None = None, why: str = "") -> None:
        self.names, self.among, self.method = names, frozenset(among), method
        self.why = why or f"it needs {_listed(names)}"

    def idle(self, settings: Settings) -> bool:
        """Whether the setting does nothing beside the others. `method`: the rule holds for that training alone."""
        return self.method in (None, settings.method) and not self._found(settings)

    def _found(self, settings: Settings) -> bool:
        values = map(settings.value, self.names)
        return any(value in self.among if self.among else value for value in values)


class Excludes(Needs):
    """The setting does nothing where one of `names` is switched on, or has one of the values `among`."""

    def __init__(self, *names: str, among: Collection[str] = (), method: Method | None = None, why: str = "") -> None:
        super().__init__(*names, among=among, method=method, why=why or f"{_listed(names)} takes its place")

    def idle(self, settings: Settings) -> bool:
        """See `Needs.idle`."""
        return self.method in (None, settings.method) and self._found(settings)


class Only(Needs):
    """The setting acts with some methods of training alone; with none: never."""

    def __init__(self, *methods: Method, why: str) -> None:
        super().__init__(why=why)
        self.methods = methods

    def idle(self, settings: Settings) -> bool:
        """See `Needs.idle`."""
        return settings.method not in self.methods


@dataclass(frozen=True, slots=True)
class Idle:
    """Settings that do nothing when `when` holds."""

    names: tuple[str, ...]
    when: Callable[[Settings], object]
    why: str


@dataclass(frozen=True, slots=True)
class Clash:
    """Settings that cannot stand together."""

    names: tuple[str, ...]
    """Where the user is pointed to: the first of these that was set."""
    when: Callable[[Settings], object]
    why: str


RULES = (Ge, Gt, Le, Lt, Must, Needs, PathTo, ZeroIsOff)
"""What may stand beside a setting's type; of an `Interval` its parts."""

# What many settings have in common.
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Amount = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Chance = Annotated[float, Interval(ge=0, lt=1)]
"""That something is dropped: never all of it."""
Rate = Annotated[float, Interval(ge=0, le=1000)]
Side = Annotated[int, Interval(ge=1, le=16384)]
Steps = Natural | Amount | str
"""A number of steps, a share of the run, or a percentage."""
CountOrOff = Annotated[Count | None, ZeroIsOff()]
NaturalOrOff = Annotated[Natural | None, ZeroIsOff()]
NumberOrOff = Annotated[float | None, ZeroIsOff()]
File = Annotated[str | None, PathTo("file")]
Folder = Annotated[str | None, PathTo("folder")]
NewFolder = Annotated[str | None, PathTo("new folder")]
Weights = Annotated[str | None, PathTo("weights")]


class Record:
    """A base of config dataclasses: their values are checked however a record is made."""

    __slots__ = ()
    RULES: ClassVar[tuple[Needs, ...]] = ()
    """Rules of every field of this class."""

    def __post_init__(self) -> None:
        """Errors: one `UserError` with all values that break the rules of their own setting."""
        if wrong := [f"{name}: {message}" for name, message in mistakes(self)]:
            raise UserError(*wrong)


def mistakes(record: object) -> Iterator[tuple[str, str]]:
    """Each field whose value breaks the rules of its own, and what is wrong with it."""
    defaults = _defaults(cast(Hashable, type(record)))
    for name, hint in hints(type(record)).items():
        value = getattr(record, name)
        if value is not defaults.get(name) and (message := mistake(hint, value)):
            yield name, message


def hints(record: type[Any]) -> Mapping[str, Any]:
    """Field -> its type with the rules that stand with it."""
    return _hints(cast(Hashable, record))


@cache
def _defaults(record: Any) -> Mapping[str, Any]:
    """Those that keep the rules: most values are these very objects, and a run makes hundreds of records."""
    found, given = hints(record), {f.name: f.default for f in fields(record) if f.default is not MISSING}
    return {name: value for name, value in given.items() if not mistake(found[name], value)}


@cache
def _hints(record: Any) -> Mapping[str, Any]:
    found = get_type_hints(record, include_extras=True)
    for base in record.__mro__:
        for name in [f.name for f in fields(base)] if "RULES" in vars(base) and is_dataclass(base) else ():
            kind, *own = get_args(found[name]) if marks(found[name]) else (found[name],)
            found[name] = Annotated[(kind, *base.RULES, *own)]  # type: ignore[attr-defined]
    return {f.name: found[f.name] for f in fields(record)}


def marks(hint: Any) -> tuple[Any, ...]:
    """What stands in a field's `Annotated` beside the type."""
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def path_to(hint: Any) -> str:
    """What a setting names a path to (`PathTo.what`); empty for settings that hold no path."""
    return next((mark.what for mark in marks(hint) if isinstance(mark, PathTo)), "")


def zero_is_off(hint: Any) -> bool:
    """Whether 0 is read as None."""
    return any(isinstance(mark, ZeroIsOff) for mark in marks(hint))


def mistake(hint: Any, value: object) -> str:
    """What is wrong with a value that has the right type, or nothing."""
    if value is None:
        return ""
    if get_origin(hint) is Annotated:
        kind, *rules = get_args(hint)
        return next(filter(None, (_broken(rule, value, rules) for rule in rules)), "") or mistake(kind, value)
    if get_origin(hint) in (Union, UnionType):
        return next((mistake(kind, value) for kind in get_args(hint) if _is_a(kind, value)), "")
    if isinstance(value, tuple):
        return next(filter(None, (mistake(get_args(hint)[0], item) for item in value)), "")
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"expected a number of at most {LARGEST}"
    return ""


def _is_a(hint: Any, value: object) -> bool:
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    kind = get_origin(kind) or kind
    return kind is not Literal and isinstance(value, (int, float) if kind is float else kind)


def _broken(rule: Any, value: Any, rules: Iterable[Any]) -> str:
    if isinstance(rule, Must) and not rule.test(value):
        found = (
            str(value).lower() if isinstance(value, bool) else len(value) if isinstance(value, tuple) else repr(value)
        )
        return f"expected {rule.expected}, found {found}"
    least, above, most, below = _limits((rule,))
    inside = (least is None or value >= least) and (above is None or value > above)
    if inside and (most is None or value <= most) and (below is None or value < below):
        return ""
    found = f"{value:g}" if isinstance(value, float) else str(value)
    return f"expected {span(rules)}, found {found}" if abs(value) <= LARGEST or most is not None else ""


def _limits(rules: Iterable[Any]) -> tuple[float | None, float | None, float | None, float | None]:
    """(least, what it must be above, most, what it must be below) of the ranges among these rules."""
    flat = [part for rule in rules for part in (rule if isinstance(rule, Interval) else (rule,))]
    ge, gt, le, lt = (next((part for part in flat if isinstance(part, kind)), None) for kind in (Ge, Gt, Le, Lt))
    return getattr(ge, "ge", None), getattr(gt, "gt", None), getattr(le, "le", None), getattr(lt, "lt", None)


def span(rules: Iterable[Any]) -> str:
    """A range in words; empty where there is none."""
    least, above, most, below = _limits(rules)
    if least is not None and below is not None:
        return f"{least:g} or more and below {below:g}"
    if least is not None:
        return f"{least:g} or more" if most is None else f"between {least:g} and {most:g}"
    return "" if above is None else f"above {above:g}"


def range_of(hint: Any) -> str:
    """The range of a setting, or of each of its values, in words; empty where there is none."""
    return span(marks(hint)) or next(filter(None, map(range_of, get_args(hint)[: 1 if marks(hint) else None])), "")


def idle(settings: Settings, records: Iterable[type], table: Iterable[Idle]) -> dict[str, str]:
    """The settings that do nothing beside the others -> why, by the rules in these records and in a table."""
    found: dict[str, str] = {}
    for record in records:
        for name, hint in hints(record).items():
            for rule in marks(hint):
                if isinstance(rule, Needs) and rule.idle(settings):
                    found.setdefault(name, rule.why)
    for related in table:
        if related.when(settings):
            found = dict.fromkeys(related.names, related.why) | found
    return found


def check_names(record: type, known: Mapping[str, Any], table: Iterable[Idle | Clash] = ()) -> None:
    """Errors: `NameError` if the rules of a record or of a table name a setting, or a value, that there is not."""
    every = [rule for hint in hints(record).values() for rule in _every_mark(hint)]
    if strange := [rule for rule in every if not isinstance(rule, RULES)]:
        raise TypeError(f"{record.__module__}: nothing reads the rule {strange[0]!r}")
    rules = [rule for rule in every if isinstance(rule, Needs)]
    named = [name for rule in (*rules, *table) for name in rule.names]
    if unknown := sorted({name for name in named if name not in known}):
        raise NameError(f"the rules of {record.__module__} name unknown settings: {', '.join(unknown)}")
    for rule in rules:
        choices = {choice for name in rule.names for choice in _choices(known[name])}
        if unknown := sorted(rule.among - choices):
            raise NameError(f"the rules of {record.__module__} name unknown values: {', '.join(unknown)}")


def _every_mark(hint: Any) -> Iterator[Any]:
    for mark in marks(hint):
        yield from mark if isinstance(mark, Interval) else (mark,)
    for part in get_args(hint)[: 1 if marks(hint) else None]:
        yield from _every_mark(part)


def _choices(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from _choices(part)


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
