"""The rules that stand with the settings: what they name exists, and they hold however a record is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest
from annotated_types import MultipleOf
from pydantic import TypeAdapter, ValidationError

from sfumato import families
from sfumato.config import Config, LossConfig, NetworkConfig, NoiseConfig, OutputConfig, Settings, rules
from sfumato.config.rules import Clash, CountOrOff, Excludes, Idle, Needs, Only, Record, mistake
from sfumato.errors import UserError
from sfumato.families.sd.facts import FACTS, Options

RECORDS = [
    *(type(getattr(Config(), f.name)) for f in fields(Config)),
    *(families.facts(name).options for name in families.names()),
]


@dataclass(frozen=True, kw_only=True)
class Lamp(Record):
    """A record with rules of every kind."""

    power: CountOrOff = None
    colour: Annotated[Literal["red", "green"], Needs("power")] = "red"
    pulse: Annotated[bool, Needs("colour", among=("green",), why="red ones do not pulse")] = False
    hue: Annotated[float, Excludes("colour", among=("red",), why="red has one")] = 0.0


def test_the_names_and_values_in_rules_are_checked() -> None:
    hints = rules.hints(Lamp)
    rules.check_names(Lamp, hints, (Idle(("hue",), lambda s: True, ""), Clash(("power",), lambda s: True, "")))

    @dataclass
    class Unknown:
        colour: Annotated[str, Needs("powr")] = ""

    @dataclass
    class Value:
        pulse: Annotated[bool, Needs("colour", among=("gren",), why="")] = False

    for record, table, name in ((Unknown, (), "powr"), (Value, (), "gren"), (Lamp, (Idle(("hew",), bool, ""),), "hew")):
        with pytest.raises(NameError, match=name):
            rules.check_names(record, hints, table)


def test_a_rule_that_nothing_reads_is_refused() -> None:
    @dataclass
    class Short:
        even: Annotated[int, MultipleOf(2)] | None = None

    with pytest.raises(TypeError, match="nothing reads the rule MultipleOf"):
        rules.check_names(Short, {})


def in_words(hint: Any) -> Iterator[str]:
    for rule in rules.marks(hint):
        if isinstance(rule, Needs):
            yield rule.why


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record.__module__}.{record.__qualname__}")
def test_every_rule_says_why(record: type) -> None:
    for name, hint in rules.hints(record).items():
        assert all(in_words(hint)), name


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record.__module__}.{record.__qualname__}")
def test_pydantic_reads_the_same_ranges(record: type) -> None:
    """What the walker refuses pydantic refuses, and the other way round; defaults are within."""
    for field in fields(record):
        hint = rules.hints(record)[field.name]
        adapter = TypeAdapter(hint)
        for value in (-2, 0, 1, 2, 17000, -0.5, 0.5, 1.5, (-1.0,), (0.5, 2000.0), (0, 8), (20000, 20000)):
            try:
                adapter.validate_python(value, strict=True)
            except ValidationError as error:
                ranges = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
                out = {e["type"] for e in error.errors()} & ranges
                assert not out or mistake(hint, value), (field.name, value)
            else:
                assert not mistake(hint, value) or "Must" in repr(hint), (field.name, value)
        assert not mistake(hint, getattr(record(), field.name)), field.name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossConfig(min_snr_gamma=0.0), "min_snr_gamma: expected above 0, found 0"),
        (lambda: NoiseConfig(min_timestep=1000), "min_timestep: expected between 0 and 999, found 1000"),
        (lambda: NoiseConfig(max_timestep=1001), "max_timestep: expected between 1 and 1000, found 1001"),
        (lambda: NetworkConfig(network_alpha=-1), "network_alpha: expected 0 or more, found -1"),
        (lambda: NetworkConfig(network_dim=2**63), "network_dim: expected a number of at most 9223372036854775807"),
        (lambda: OutputConfig(output_name="nul"), "output_name: expected a name that Windows takes too"),
        (lambda: Options(clip_skip=0), "clip_skip: expected 1 or more, found 0"),
    ],
)
def test_ranges_hold_however_a_record_is_made(make: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert error.value.messages[0].startswith(message)


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        ({"noise_offset_random_strength": True}, "noise_offset_random_strength: it needs noise_offset"),
        ({"adaptive_noise_scale": 0.1}, "adaptive_noise_scale: it needs noise_offset"),
        ({"ip_noise_gamma_random_strength": True}, "ip_noise_gamma_random_strength: it needs ip_noise_gamma"),
        ({"min_timestep": 500, "max_timestep": 400}, "max_timestep: min_timestep must be below max_timestep"),
    ],
)
def test_what_would_do_nothing_in_a_config_of_python_is_refused(noise: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        FACTS.check(Settings.of(Config(noise=NoiseConfig(**noise), family=Options()), "network"))
    (message,) = error.value.messages
    assert message.startswith(said)
    FACTS.check(
        Settings.of(Config(noise=NoiseConfig(noise_offset=0.1, adaptive_noise_scale=0.1), family=Options()), "full")
    )


def test_each_kind_of_rule() -> None:
    settings = Settings(family=Options(), lr_scheduler="cosine", cache_latents=True, noise_offset=0.1)
    idle = {
        Needs("cache_latents", "cache_latents_to_disk"): False,
        Needs("cache_latents_to_disk"): True,
        Needs("lr_scheduler", among=("cosine",), why="-"): False,
        Needs("lr_scheduler", among=("linear",), why="-"): True,
        Needs("train_text_encoder", method="full"): False,
        Excludes("noise_offset"): True,
        Excludes("ip_noise_gamma"): False,
        Excludes("noise_offset", method="full"): False,
        Only("full", why="-"): True,
        Only("network", why="-"): False,
        Only(why="-"): True,
    }
    assert [rule.idle(settings) for rule in idle] == list(idle.values())
    assert Needs("a", "b", "c").why == "it needs a, b or c" and Excludes("a").why == "a takes its place"


def test_options_of_another_family_are_not_taken() -> None:
    assert Options.of(Options(clip_skip=2)).clip_skip == 2
    with pytest.raises(TypeError, match=r"sd\.facts\.Options was expected"):
        Options.of(families.facts("flux").options())
    assert {name: families.facts(name).options.family for name in families.names()} == {n: n for n in families.names()}
