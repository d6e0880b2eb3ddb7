"""What LyCORIS' module does that others do not: convolutions as well, and presets of what gets adapters. Imports no
torch."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.adapters import values
from sfumato.adapters.find import LYCORIS, kind
from sfumato.adapters.plan import DROPOUTS, NONE, TEXT, AdapterPlan, LayerRule
from sfumato.config import rules
from sfumato.config.rules import Amount, Natural
from sfumato.errors import UserError, nearest
from sfumato.formats.text import parse_toml, read_text

if TYPE_CHECKING:
    from sfumato.adapters.base import Adapter

_FULL, _LINEAR = ("linear", "conv", "ends", "time"), ("linear",)
PRESETS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "full": (_FULL, True),
    "full-lin": (_FULL, False),
    "attn-mlp": (_LINEAR, False),
    "attn-only": (("attention",), False),
    "unet-only": (tuple(f"denoiser.{name}" for name in _FULL), True),
    "unet-transformer-only": (("denoiser.linear",), False),
    "unet-convblock-only": (("denoiser.conv", "denoiser.ends"), True),
    "ia3": (("ia3",), False),
}
"""LyCORIS' preset -> the sets of layers that get adapters, and whether convolutions larger than 1x1 are among them."""
_LISTS = ("unet_target_module", "unet_target_name", "text_encoder_target_module", "text_encoder_target_name")
_KEYS = (*_LISTS, "exclude_name", "enable_conv", "use_fnmatch", "module_algo_map", "name_algo_map")
_UNREAD = ("target_module", "target_name", "lora_prefix")
"""Keys of LyCORIS' files that its module for kohya's trainer does not read."""


def apply(plan: AdapterPlan, preset: str | None, conv_alpha: float | None) -> AdapterPlan:
    """The plan with LyCORIS' defaults, and what the preset names. `conv_alpha`: as given. Errors: `UserError` for a
    preset that is not known, or a file that cannot be read."""
    if conv_alpha is None:
        plan = replace(plan, conv_alpha=plan.alpha)
    elif plan.large and plan.conv_rank is None:
        plan = replace(plan, conv_rank=plan.rank)
    if plan.targets:
        return plan
    if (found := PRESETS.get(preset or "full")) is None:
        return _from_file(plan, str(preset))
    own = plan.rules
    if preset == "ia3" and "train_on_input" in values.types(plan.kind.Options):
        own += (LayerRule(pattern=re.compile(r".*\.(ff\.net\.2|mlp\.fc2)"), more={"train_on_input": True}),)
    return _without_large(replace(plan, targets=found[0], targets_from="preset", rules=own), found[1])


def _without_large(plan: AdapterPlan, large: bool) -> AdapterPlan:
    return plan if large else replace(plan, large=False, conv_rank=None)


def _from_file(plan: AdapterPlan, path: str) -> AdapterPlan:
    """The plan with what a preset file says; classes of modules are names of sets here."""
    told, where = _read(path), f"network_args preset={path}"
    spelled = fnmatch.translate if told.get("use_fnmatch") else "(?:{}).*".format
    modules = {name: told.get(name) for name in _LISTS}
    targets: list[str] = []
    for component, part in (("denoiser", "unet"), (TEXT, "text_encoder")):
        chosen, names = modules[f"{part}_target_module"], modules[f"{part}_target_name"]
        targets += [f"{component}.{name}" for name in (_FULL if chosen is None else chosen)]
        targets += [f"{component}.{NONE}"] if names else []
    compiled = partial(_compiled, where)
    include = [
        compiled(name, rf"{before}\.(?:{spelled(name)}|{re.escape(name)})")
        for part, before in (("unet", "denoiser"), ("text_encoder", r"(?!denoiser\.)\w+"))
        for name in modules[f"{part}_target_name"] or ()
    ]
    exclude = [compiled(name, rf"(?:{_open(spelled(name))})(?:\..*)?") for name in told.get("exclude_name", ())]
    own = partial(_own, plan.kind)
    for_layers = [
        *(LayerRule(set=name, **own(f"{where}: module_algo_map.{name}", each)) for name, each in _map(told, "module")),
        *(
            LayerRule(pattern=compiled(name, _open(spelled(name))), **own(f"{where}: name_algo_map.{name}", each))
            for name, each in _map(told, "name")
        ),
    ]
    made = replace(
        plan,
        targets=tuple(targets),
        targets_from="preset file",
        include=(*plan.include, *include),
        exclude=(*plan.exclude, *exclude),
        rules=(*plan.rules, *for_layers),
    )
    return _without_large(made, told.get("enable_conv", True))


def _open(pattern: str) -> str:
    """A pattern of names as one that kohya's own names, which begin otherwise, do not hold."""
    return rf"\A{pattern}"


def _map(told: Mapping[str, Any], of: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    found: Mapping[str, Mapping[str, Any]] = told.get(f"{of}_algo_map", {})
    return found.items()


def _read(path: str) -> Mapping[str, Any]:
    """A preset file. Errors: `UserError` for one that is not there, is not TOML, or has keys of another kind."""
    try:
        told = parse_toml(path, read_text(path))
    except UserError as error:
        if not Path(path).is_file():
            raise UserError(
                f"network_args preset={path}: expected {', '.join(PRESETS)}, or a TOML file{nearest(path, PRESETS)}"
            ) from None
        raise UserError(*(f"network_args preset={message}" for message in error.messages)) from None
    if wrong := list(_mistakes(told)):
        raise UserError(*(f"network_args preset={path}: {message}" for message in wrong))
    return told


def _mistakes(told: Mapping[str, Any]) -> Iterator[str]:
    for key, value in told.items():
        if key in _UNREAD:
            yield f"{key}: LyCORIS reads it outside of kohya's trainer alone; write unet_{key} or text_encoder_{key}"
        elif key not in _KEYS:
            yield f"{key!r} is not known{nearest(key, _KEYS)}"
        elif key.endswith("_algo_map"):
            if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
                yield f"{key}: expected tables of algo, dim, alpha ..."
        elif key in ("enable_conv", "use_fnmatch"):
            if not isinstance(value, bool):
                yield f"{key}: expected true or false"
        elif not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            yield f"{key}: expected a list of names"


def _compiled(where: str, name: str, pattern: str) -> re.Pattern[str]:
    """A pattern that was made of `name`. Errors: `UserError` if that is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {name!r} is no regular expression: {error.msg}") from None


def _own(common: type[Adapter], where: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """A map's entry, for a `LayerRule`. `common`: the kind where it names none. Errors: `UserError` for what the kind
    does not have, and for values that cannot be."""
    chosen = kind(LYCORIS, str(told["algo"])) if "algo" in told else common
    known = {n: of for n, of in values.types(chosen.Options).items() if n not in DROPOUTS or n in chosen.supports}
    allowed = {**rules.hints(chosen.Options), "dim": Natural, "alpha": Amount}
    more, numbers, errors = dict[str, Any](), dict[str, Any](), list[str]()
    for name, value in told.items():
        if name in known:
            more[name] = values.typed(name, str(value), known[name], errors)
        elif name in ("dim", "alpha"):
            numbers[name] = values.typed(name, str(value), "int" if name == "dim" else "float", errors)
        elif name != "algo" and not values.off(str(value)):
            errors.append(f"{where}: {name} has no meaning for {chosen.__name__}{nearest(name, known)}")
    errors += [
        f"{where}: {name}={value}: {message}"
        for name, value in (more | numbers).items()
        if (message := rules.mistake(allowed[name], value))
    ]
    if errors:
        raise UserError(*errors)
    return {"kind": chosen, "more": more, "rank": numbers.get("dim"), "alpha": numbers.get("alpha")}
