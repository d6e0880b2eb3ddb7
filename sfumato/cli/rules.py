"""What is wrong with what a user set, by the rules that stand with the settings (`config/rules.py`), to the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sfumato.cli.options import Option
from sfumato.cli.report import Given, Report
from sfumato.config import Settings, rules
from sfumato.formats.paths import is_text
from sfumato.models.facts import Facts


def mistake(option: Option, value: object) -> str:
    """What is wrong with a value of the right type, or nothing. Paths may hold bytes that are no text; what gets into
    captions and files may not."""
    texts = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, str)]
    if not rules.path_to(option.hint) and not all(map(is_text, texts)):
        return "expected text in UTF-8"
    return rules.mistake(option.hint, value)


def clashes(
    settings: Settings, given: Mapping[str, Given], facts: Facts, report: Report, *, wrong: Collection[str] = ()
) -> None:
    """Report what cannot stand together. `wrong`: settings that were reported already."""
    for rule in (r for r in facts.clashing(settings) if not {*r.names} & {*wrong}):
        first = next((given[name] for name in rule.names if name in given), None)
        report.error(f"{first or rule.names[0]}: {rule.why}")


def idle(
    settings: Settings,
    defaults: Mapping[str, object],
    given: Mapping[str, Given],
    facts: Facts,
    report: Report,
    *,
    trains: bool,
) -> None:
    """Report what a user set that has no effect. `trains`: it is for a training, not for sampling images alone."""
    found = facts.without_effect(settings, trains=trains)
    for name in given:
        if name not in defaults or settings.value(name) == defaults[name]:
            continue
        if name in facts.refused:
            report.error(f"{given[name]}: {facts.refused[name]}")
        elif name in found:
            report.without_effect(given[name], found[name])
