"""Prints docs/options.md, the page of all settings, from the config's dataclasses: `python -m
sfumato.cli.reference`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sfumato import families
from sfumato.cli import flags, kohya_settings, options, values
from sfumato.config import rules
from sfumato.models.facts import Facts
from sfumato.sampling import prompts

HEAD = """# Options

Made by `python -m sfumato.cli.reference > docs/options.md` from the dataclasses in `sfumato/config/`; do not edit.

Each setting is a flag (`--learning_rate 1e-4`) and a key of the config file (`learning_rate = 1e-4`, in a section of
any name). Defaults give way to `--config FILE`, and that to flags. A switch is turned on by its name (`--flip_aug`)
and off again by `--flip_aug false`. A relative path is looked for in the current folder, then beside the file that
names it.

A setting that is unknown, or that would have no effect beside the others, is an error. With kohya's scripts and with
`--config_file FILE` (a file made for them) settings without effect are stated and passed over.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for section, record in options.sections().items():
        parts.append(_section(section, (record.__doc__ or "").split("\n")[0], options.of(record, section).values()))
    for family in families.names():
        record = families.facts(family).options
        parts.append(
            _section(f"family {family}", (record.__doc__ or "").split("\n")[0], options.of_family(family).values())
        )
    parts.append(_prompts())
    parts.append(_kohya())
    return "\n".join(parts)


def _section(title: str, text: str, found: Iterable[options.Option]) -> str:
    told = _of_families(lambda facts: facts.defaults)
    rows = [f"| `{o.name}` | {_cell(expected_of(o))} | {_defaults(o, told)} | {_cell(o.help)} |" for o in found]
    return "\n".join(
        [f"## {title}", "", text, "", "| setting | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    )


def _prompts() -> str:
    letters = {name: f"`--{letter}`" for letter, name in prompts.OPTIONS.items()}
    told = _of_families(lambda facts: facts.prompt)
    rows = [
        f"| `{o.name}` | {letters.get(o.name, '')} | {_defaults(o, told)} | {_cell(o.help)} |"
        for o in options.of(prompts.Prompt, "prompts").values()
    ]
    return "\n".join(
        [
            "## Prompts",
            "",
            "Keys of a prompt file (.toml, .json), options of a line of a .txt. What has defaults of families alone is",
            "for these, and is refused for others; `guidance_scale` is for models that were distilled with guidance.",
            "",
            *("| key | option | default | meaning |", "|---|---|---|---|", *rows, ""),
        ]
    )


def _of_families(values: Callable[[Facts], Mapping[str, Any]]) -> dict[str, list[str]]:
    """Name -> the defaults that single families have, each after the family."""
    told: dict[str, list[str]] = {}
    for family in families.names():
        for name, value in values(families.facts(family)).items():
            told.setdefault(name, []).append(f"{family} `{flags.show(value)}`")
    return told


def _defaults(option: options.Option, told: Mapping[str, list[str]]) -> str:
    return ", ".join(filter(None, [_shown(option.default), *told.get(option.name, [])]))


def expected_of(option: options.Option) -> str:
    """The type and the range in words: "a whole number, 1 or more"."""
    return ", ".join(filter(None, (values.expected(option.kind), rules.range_of(option.hint))))


def _shown(default: object) -> str:
    return "" if default in (None, "", ()) else f"`{flags.show(default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _kohya() -> str:
    renamed = {name: f"{new} = {value}" if value else new for name, (new, value) in kohya_settings.RENAMED.items()}
    return "\n".join(
        [
            "## Settings of kohya's scripts that are no settings of sfumato",
            "",
            *_pairs("Read as", renamed),
            *_pairs("Accepted, no effect", kohya_settings.INERT),
            *_pairs("Refused", kohya_settings.REFUSED),
        ]
    )


def _pairs(title: str, rows: Mapping[str, str]) -> list[str]:
    return [
        f"### {title}",
        "",
        "| setting | |",
        "|---|---|",
        *(f"| `{name}` | {_cell(text)} |" for name, text in sorted(rows.items())),
        "",
    ]


if __name__ == "__main__":
    print(page(), end="")
