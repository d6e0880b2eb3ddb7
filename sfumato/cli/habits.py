"""What kohya's lines and front ends write otherwise: shortened flags, network_args at the top of a file, "" for
nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from functools import cache

from sfumato import families
from sfumato.adapters.arguments import CommonArgs
from sfumato.cli import kohya_settings, options
from sfumato.cli.report import Given, Report

_DROPOUTS = ("rank_dropout", "module_dropout")


def full_name(word: str, names: Collection[str], report: Report) -> str:
    """A word of a command line, with a flag that is the beginning of one name alone written out, as argparse reads
    it; the whole name of a setting of ours is that one."""
    short, equals, value = word.removeprefix("--").partition("=")
    if not word.startswith("--") or not short or short in names or short in options.known():
        return word
    if len(meant := beginning(short, names)) != 1:
        return word  # unknown, or of several meanings: reported with the unknown flags
    report.note(f"--{short}: read as --{meant[0]}")
    return f"--{meant[0]}{equals}{value}"


def beginning(short: str, names: Collection[str]) -> list[str]:
    """The names that begin so."""
    return sorted(name for name in names if name.startswith(short))


@cache
def network_args() -> frozenset[str]:
    """Arguments of adapters that front ends write as settings of their own."""
    theirs = [record for name in families.names() if (record := families.facts(name).network_args)]
    found = {f.name for record in (CommonArgs, *theirs) for f in fields(record)}
    return frozenset({*found, *_DROPOUTS} - set(options.known()))


def gathered(found: Mapping[str, Given], report: Report) -> dict[str, Given]:
    """The settings of a file with those that belong there put into network_args; sd-scripts does not read them, which
    users do not know."""
    out = {key: each for key, each in found.items() if key not in network_args()}
    for key, each in found.items():
        if key in network_args() and not kohya_settings.off(each):
            _put(out, each, report)
    return out


def _put(out: dict[str, Given], each: Given, report: Report) -> None:
    values = each.value if isinstance(each.value, list) else [each.value]
    text = f"{each.key}={','.join(map(str, values))}"
    old = out.get("network_args", replace(each, key="network_args", value=[]))
    texts = list(old.value) if isinstance(old.value, list) else [old.value]
    if any(str(t).partition("=")[0] == each.key for t in texts if t != text):
        report.error(f"{each}: network_args says something else; leave one of them out")
    elif text not in texts:
        report.note(f"{each}: taken as network_args {text}")
        out["network_args"] = replace(old, value=[*texts, text])
