"""What run tests share: a config from flat names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.families.sd.facts import Options

Train = Callable[..., Path]


def config(**options: Any) -> Config:
    """A config from flat field names."""
    sections = {}
    for section in fields(Config):
        default = getattr(Config(), section.name)
        if section.name != "family":
            mine = {f.name: options.pop(f.name) for f in fields(default) if f.name in options}
            sections[section.name] = replace(default, **mine)
    family = options.pop("family", Options())
    assert not options, options
    return Config(**sections, family=family)
