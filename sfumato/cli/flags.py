"""Defaults < TOML < flags -> one checked `Config`, with everything that is wrong in one error; imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from sfumato import families
from sfumato.cli import habits, kohya_settings, options, paths, rules, toml, values
from sfumato.cli.report import Given, Report
from sfumato.config import Config, DatasetConfig, Method, Settings
from sfumato.config.rules import Only, marks, zero_is_off
from sfumato.errors import UserError, nearest
from sfumato.formats.paths import trouble
from sfumato.models.facts import Facts

CONFIGS = {
    "config": "TOML file with any of these settings, in sections of any name; flags win over it.",
    "config_file": "The same for a file made for kohya's scripts: settings without effect are stated, not refused.",
}


class Parser(argparse.ArgumentParser):
    """argparse that raises a UserError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `--help` lists all flags")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The flags. Errors: `UserError`, for unknown ones with the nearest name."""
        parsed, strange = self.parse_known_args(args, namespace)
        known = [name for action in self._actions for name in action.option_strings if action.help != argparse.SUPPRESS]
        if strange:
            unknown = [word for word in strange if word.startswith("-")] or strange
            raise UserError(*(f"{self.prog}: unknown: {w}{nearest(w.partition('=')[0], known)}" for w in unknown))
        return parsed


def parser(prog: str, *, names: Iterable[str] | None = None, method: Method | None = None) -> Parser:
    """Flags for all settings (or those in `names`), grouped as the config is; help tells those of `method` alone.

    Values stay strings: they are checked together with those of the files.
    """
    made = Parser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--flag value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, text in CONFIGS.items():
        made.add_argument(f"--{name}", metavar="FILE", help=text)
    wanted = None if names is None else set(names)
    groups: dict[str, Any] = {}
    for option in options.known().values():
        if wanted is None or option.name in wanted:
            if option.section not in groups:
                groups[option.section] = made.add_argument_group(option.section)
            others = method and any(isinstance(m, Only) and method not in m.methods for m in marks(option.hint))
            argument = _argument(option) | ({"help": argparse.SUPPRESS} if others else {})
            groups[option.section].add_argument(f"--{option.name}", **argument)
    for name in sorted(kohya_settings.names()) if wanted is None else ():
        made.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return made


def _argument(option: options.Option) -> dict[str, Any]:
    text = option.help.replace("%", "%%")
    shown = values.expected(option.kind)
    if bool in values.parts(option.kind):
        return {"nargs": "?", "const": True, "metavar": "false", "help": text}
    if shown.startswith("a list"):
        return {"nargs": "*", "metavar": "X", "help": text}
    default = "" if option.default in (None, "") else f" (default: {show(option.default)})"
    choices = f" [{shown.removeprefix('one of ')}]" if shown.startswith("one of ") else ""
    return {"metavar": "X", "help": f"{text}{choices}{default}".replace(" (default: %)", " (default: %%)")}


def show(value: object) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A checked config, and notes on it."""

    config: Config
    datasets: tuple[DatasetConfig, ...]
    notices: tuple[str, ...]
    read: tuple[Path, ...] = field(default=(), compare=False)
    """The config files that were read."""
    given: frozenset[str] = field(default=frozenset(), compare=False)
    """The settings that the user set."""


def note(notice: str) -> None:
    """A note on stderr, by the first process of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {notice}", file=sys.stderr)


def resolve_all(
    argv: Sequence[str],
    method: Method,
    *,
    data: bool = True,
    family: str | None = None,
    only: Iterable[str] | None = None,
    prog: str = "sfumato",
    kohya: bool = False,
    short: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
    adapt: Callable[[dict[str, Given], Report], None] | None = None,
) -> Resolved:
    """The config and datasets of a command line.

    Errors: one `UserError` with all mistakes, each with its file, line and key.

    `data`: whether images are needed. `family`: where no base model tells it. `only`: the flags there are; files may
    say more, for other commands. `kohya`: state what has no effect instead of refusing it. `short`: flags that may be
    shortened. `defaults`: other defaults than ours.
    `adapt`: changes what was given before it is checked.
    """
    report = Report()
    given = gather(argv, report, prog=prog, lenient=kohya, only=only, method=method if data else None, short=short)
    read = tuple(dict.fromkeys(g.source for g in given.values() if g.source))
    if adapt:
        adapt(given, report)
    kohya_settings.settle(given, report)
    given = paths.settled(given, report)
    family = family or find_family(given, report)
    facts = families.facts(family)
    known = {**options.common(), **options.of_family(family)}
    plain = {name: o.default for name, o in known.items()} | dict(facts.defaults) | dict(defaults or {})
    valid = checked(known, given, report)
    found = plain | valid
    settings = _settings(found, facts, method)
    datasets = _datasets(settings, given, report) if data else ()
    rules.idle(settings, plain, given, facts, report, trains=data)
    settings = _settings(found | {name: plain[name] for name in report.idle}, facts, method)
    rules.clashes(settings, given, facts, report, wrong=given.keys() - valid.keys())
    report.finish()
    return Resolved(build(settings), datasets, tuple(report.notices), read, frozenset(given))


def _settings(values: Mapping[str, Any], facts: Facts, method: Method) -> Settings:
    own = facts.options(**{f.name: values[f.name] for f in fields(facts.options)})
    return Settings(**{name: values[name] for name in options.common()}, method=method, family=own)


def _datasets(settings: Settings, given: Mapping[str, Given], report: Report) -> tuple[DatasetConfig, ...]:
    from sfumato.cli import datasets

    if not any(getattr(settings, name) for name in datasets.SOURCES):
        if not given.keys() & {*datasets.SOURCES}:  # else it is told what is wrong with it
            report.error(
                "no images: set dataset_config (a dataset file) or train_data_dir (a folder of folders `<repeats>_"
                "<class tokens>`), in_json or dataset_class"
            )
        return ()
    return datasets.read(settings, given, report)


def gather(
    argv: Sequence[str],
    report: Report,
    *,
    prog: str = "sfumato",
    lenient: bool = False,
    only: Iterable[str] | None = None,
    method: Method | None = None,
    short: Collection[str] = (),
) -> dict[str, Given]:
    """The settings of the command line and of the files that it names; flags win."""
    parsed, strange = parser(prog, names=only, method=method).parse_known_args(
        [habits.full_name(word, short, report) for word in argv]
    )
    flag_values, flag_names = vars(parsed), every_name() if only is None else [*only, *CONFIGS]
    for word in strange:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            report.error(f"--{name}: {_strange(name, flag_names, prog, short)}")
        elif not any(w.startswith("--") for w in strange):
            report.error(f"{word!r}: a flag was expected, such as --config FILE")
    found: dict[str, Given] = {}
    for key in CONFIGS:
        if key in flag_values:
            found |= from_file(flag_values.pop(key), report, key=key, lenient=lenient or key == "config_file")
    flags = [Given(name, _flag_value(value), "", True, lenient) for name, value in flag_values.items()]
    return found | {g.key: g for g in _own_words(flags, report)}


def _strange(name: str, known: Sequence[str], prog: str, short: Collection[str]) -> str:
    if several := habits.beginning(name, short):
        return f"could be {', '.join(f'--{n}' for n in several)}: write it out"
    return f"is not a flag of `{prog}`" if name in every_name() else f"unknown flag{nearest(name, known)}"


def _flag_value(value: Any) -> Any:
    return True if value == [] else value


def every_name() -> list[str]:
    """All settings that can be written, kohya's included."""
    return [*options.known(), *kohya_settings.names(), *CONFIGS]


def _own_words(settings: Iterable[Given], report: Report) -> list[Given]:
    """In our own words. One of two names of a setting that is switched off says nothing; two that are on must agree."""
    found: dict[str, Given] = {}
    written: dict[str, Given] = {}
    for each in settings:
        ours = kohya_settings.translate(each, report) if each.key in kohya_settings.names() else each
        if ours is None or (ours.key in found and kohya_settings.off(ours)):
            continue
        other = found.get(ours.key)
        if other and not kohya_settings.off(other) and kohya_settings.alone(other) != kohya_settings.alone(ours):
            report.error(f"{each}: {written[ours.key]} sets {ours.key} to something else; leave one of the two out")
        found[ours.key], written[ours.key] = ours, each
    return list(found.values())


def from_file(name: str, report: Report, *, key: str, lenient: bool) -> dict[str, Given]:
    """The settings of a config file, which `key` names: sections are free, keys are not. Errors: `UserError` if it
    cannot be read."""
    path = Path(name).expanduser()
    if not os.path.exists(path) and Path(f"{path}.toml").is_file():
        path = Path(f"{path}.toml")
    if problem := paths.missing("config file", path):
        report.error(problem)
        report.finish()
    try:
        content, lines = toml.read(path)
    except UserError as e:
        report.errors += e.messages
        report.finish()  # what the file sets is not known, so nothing can be missed in it
    if problem := _dataset_file(content, key):
        report.error(f"{path}: {problem}")
        report.finish()
    found: dict[str, Given] = {}
    for place, value in _flat(content):
        where = f"{path}:{lines[place]}" if place in lines else str(path)
        each = Given(str(place[-1]), value, where, False, lenient, path)
        if problem := _not_a_setting(each, found):
            report.error(f"{each}: {problem}")
        elif not (lenient and value == ""):  # front ends write "" where nothing is set
            found[each.key] = each
    return {g.key: g for g in _own_words(habits.gathered(found, report).values(), report)}


def _dataset_file(content: Mapping[str, Any], key: str) -> str:
    """What is wrong if this is a dataset file in place of a config file."""
    if not isinstance(content.get("datasets"), list):
        return ""
    if set(content) <= {"general", "datasets"}:
        return f"is a dataset file, with [[datasets]], not a config file: name it with --dataset_config, not --{key}"
    return (
        "[[datasets]] stand in a file of their own, with [general]: move them there, and name that file with "
        "dataset_config"
    )


def _flat(content: Mapping[str, Any], at: tuple[str | int, ...] = ()) -> Iterable[tuple[tuple[str | int, ...], Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, (*at, name))
        else:
            yield (*at, name), value


def _not_a_setting(given: Given, found: Mapping[str, Given]) -> str:
    if given.key in found:
        return f"was set before, at {found[given.key].where}"
    if (
        given.key in options.known()
        or given.key in kohya_settings.names()
        or (given.lenient and given.key in habits.network_args())
    ):
        return ""
    return f"unknown setting{nearest(given.key, every_name())}"


def find_family(given: Mapping[str, Given], report: Report) -> str:
    """The family of the base model, from its header; a stand-in while the path is wrong, so that the rest can be
    checked."""
    from sfumato.families.detect import detect_file

    stand_in = next((options.owners()[k][0] for k in given if k in options.owners()), families.names()[0])
    base = given.get("pretrained_model_name_or_path")
    if base is None or not isinstance(base.value, str) or not base.value:
        report.error(
            "no base model: set pretrained_model_name_or_path to a .safetensors or .ckpt file, a diffusers folder or a "
            "hub id"
        )
        return stand_in
    if report.errors and (paths.is_hub_id(base.value) or trouble(paths.expanded(base.value), "file or folder")):
        # Nothing is fetched from the hub for a run that cannot start, and what is wrong with a path was reported.
        return stand_in
    try:
        family = detect_file(base.value).family
    except UserError as e:
        for message in e.messages:
            report.error(f"{base}: {message.removeprefix('pretrained_model_name_or_path: ')}")
        return stand_in
    for name, each in given.items():
        if name in options.owners() and family not in options.owners()[name]:
            whose = f"is a setting of {', '.join(options.owners()[name])}, but the base model is of the family {family}"
            if each.lenient:  # graphical front ends of kohya's scripts write every family's settings
                report.note(f"{each}: accepted, no effect: it {whose}")
            else:
                report.error(f"{each}: {whose}")
    return family


def checked(known: Mapping[str, options.Option], given: Mapping[str, Given], report: Report) -> dict[str, Any]:
    """The values of what was given, those with mistakes left out."""
    found: dict[str, Any] = {}
    for name, each in given.items():
        if name not in known:
            continue  # another family's, reported before
        try:
            value = values.convert(known[name].kind, each.value, text=each.flag, lax=each.lenient)
        except ValueError as e:
            report.error(f"{each}: {e}")
            continue
        if value == 0 and zero_is_off(known[name].hint):
            value = None
        if problem := rules.mistake(known[name], value):
            report.error(f"{each}: {problem}")
        else:
            found[name] = value
    return found


def build(settings: Settings) -> Config:
    """The records from all settings."""
    records = {
        section: record(**{f.name: getattr(settings, f.name) for f in fields(record)})
        for section, record in options.sections().items()
    }
    return Config(**records, family=settings.family)


def write_toml(config: Config) -> str:
    """The whole config as TOML that reads back to the same `Config`."""
    tables = {name: getattr(config, name) for name in options.sections()}
    return toml.write({**tables, "family": config.family})
