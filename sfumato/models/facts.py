"""What a family's `facts.py` holds: all that is known of it before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sfumato.config import FamilyOptions, LossConfig, Method, NoiseConfig, Settings, relations, rules
from sfumato.config.rules import Clash, Idle
from sfumato.errors import UserError
from sfumato.formats.clients import Names
from sfumato.models.detection import Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The record `FACTS` of a family's `facts.py`."""

    options: type[FamilyOptions]
    """The settings of this family alone."""
    signature: Signature
    """How its files are recognised."""
    architecture: Callable[[FamilyOptions], str]
    """options -> the model's name in modelspec metadata, without the ending for adapters."""
    base_model_version: Callable[[FamilyOptions], str]
    """options -> the model's name in sd-scripts' metadata, `ss_base_model_version`."""
    implementation: str = ""
    """The model's own code, as sd-scripts names it in the metadata of adapters; only where a program goes by it."""
    pipelines: tuple[str, ...]
    """Classes that a diffusers folder of this family names."""
    denoiser_folder: str = "transformer"
    denoiser_beside: Mapping[str, str] = field(default_factory=dict)
    """See `Component.beside`."""
    needed: tuple[str, ...] = ("denoiser",)
    """What of `WHOLE` a base model's file must hold; the rest may come from files of its own."""
    scripts: Mapping[str, Method] = field(default_factory=dict)
    """kohya's scripts -> what they train."""
    script_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """One of `scripts` -> settings that its name says."""
    trains_text: tuple[str, ...] = ()
    """Those of `scripts` that train the text encoder unless asked otherwise."""
    script_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Those of `scripts` that have defaults of their own which differ from ours, and these."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all families that have another default here."""
    prompt: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of prompts, where they differ from `sampling/prompts.py: Prompt`."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Settings that would do nothing for this family, and why."""
    idle: tuple[Idle, ...] = ()
    """Settings that do nothing beside others, beyond the rules that stand with the options."""
    clashes: tuple[Clash, ...] = ()
    """Settings that cannot stand together."""
    network_args: type | None = None
    """The dataclass of network_args that only this family has; its fields are int, float, bool or str, or None where
    not set."""
    metadata: tuple[str, ...] = ()
    """Options that are written into results, as `ss_<option>`."""
    swaps_pairs: bool = False
    """Whether sd-scripts' `blocks_to_swap` takes half of its number from the blocks of two streams, and twice the other
    half from those of one."""
    loads_in: tuple[Names, ...] = ()
    """What layers of adapters are called, and which programs load them by those names; the first that fits counts."""

    def __post_init__(self) -> None:
        known = {**rules.hints(Settings), **rules.hints(self.options)}
        rules.check_names(self.options, known, (*self.idle, *self.clashes))

    def swapped(self, number: int) -> int:
        """Of all blocks, those that sd-scripts swaps with this `blocks_to_swap`."""
        return number // 2 + 2 * (number - number // 2) if self.swaps_pairs else number

    def without_effect(self, settings: Settings, *, trains: bool = True) -> dict[str, str]:
        """The settings that do nothing beside the others -> why. `trains`: in a training, not for samples alone."""
        if not trains:
            return rules.idle(settings, (self.options,), self.idle)
        return rules.idle(settings, (Settings, self.options), (*relations.IDLE, *self.idle))

    def clashing(self, settings: Settings) -> list[Clash]:
        """The rules that these settings break."""
        return [rule for rule in (*relations.CLASHES, *self.clashes) if rule.when(settings)]

    def check(self, settings: Settings) -> None:
        """For a config that was made in Python. Errors: one `UserError` with all clashes, and with all settings of
        noise, loss and the family's own that would do nothing."""
        plain = Settings(**self.defaults, family=self.options())
        found = {**self.without_effect(settings), **self.refused}
        numbers = [name for record in (NoiseConfig, LossConfig, self.options) for name in rules.hints(record)]
        # What is 0 or false is switched off.
        wrong = [
            f"{name}: {found[name]}; leave it out"
            for name in numbers
            if name in found and settings.value(name) not in (plain.value(name), 0)
        ]
        if wrong := wrong + [f"{rule.names[0]}: {rule.why}" for rule in self.clashing(settings)]:
            raise UserError(*wrong)
