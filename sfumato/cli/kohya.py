"""Command lines of kohya's sd-scripts: an old script's name -> what it trains, its defaults, its ways of saying
things."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sfumato import families
from sfumato.cli import flags, kohya_settings, main, options
from sfumato.cli.report import Given, Report
from sfumato.config import Method
from sfumato.errors import UserError


@dataclass(frozen=True, slots=True)
class Script:
    """What one of kohya's scripts does."""

    method: Method
    families: tuple[str, ...]
    trains_text: bool = False
    """It trains the text encoder unless asked otherwise."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Where kohya's defaults differ from ours and change the result."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What its name says."""


@cache
def scripts() -> Mapping[str, Script]:
    """kohya's scripts by name, as the families name them."""
    found: dict[str, Script] = {}
    for family in families.names():
        facts = families.facts(family)
        for name, method in facts.scripts.items():
            others = found[name].families if name in found else ()
            found[name] = Script(
                method,
                (*others, family),
                trains_text=name in facts.trains_text,
                defaults={**DEFAULTS, **facts.script_defaults.get(name, {})},
                settings=facts.script_settings.get(name, {}),
            )
    return found


SWAPS = ("blocks_to_swap", "double_blocks_to_swap", "single_blocks_to_swap")
CACHED = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")
DEFAULTS: Mapping[str, object] = {"learning_rate": 2e-6, "caption_extension": ".caption"}
"""`Script.defaults` of all."""

TAKEN = ("--output_config", "--debug_dataset")
"""Flags that do something in place of the training: write the settings to a file, show the plan."""

OURS = frozenset(
    {
        "cache_dir",
        "class_tokens",
        "dialect",
        "ema_decay",
        "embedding_lr",
        "fused_clipping",
        "gradient_checkpointing_every",
        "gradient_checkpointing_keep",
        "int8_matmul",
        "kahan_summation",
        "masked_prior_weight",
        "micro_batch",
        "num_repeats",
        "optimizer_state_on_cpu",
        "prior_preservation_class",
        "quantize",
        "quantize_budget",
        "quantize_text_encoders",
        "save_best",
        "simulate_vram",
        "skip_image_resolution",  # since sd-scripts of spring 2026
        "skip_unreadable",
        "stream_text_encoders",
        "text_encoder_blocks_to_swap",
        "textual_inversion_embeddings",
        "tokenizer",
        "vae_tile_size",
        "vram",
        "xti",
    }
)
"""Settings of all families that kohya's command lines do not have."""


def run(script: str, argv: Sequence[str]) -> int:
    """Run a command line of kohya's script of this name (without `.py`); the exit code."""
    return main.guarded(lambda: _run(script, list(argv)))


def _run(script: str, argv: list[str]) -> int:
    what = scripts()[script]
    taken, rest = {word for word in argv if word in TAKEN}, [word for word in argv if word not in TAKEN]
    where, rest = _config_file(rest) if "--output_config" in taken else (None, rest)
    resolved = resolve(script, rest)
    for notice in resolved.notices:
        flags.note(notice)
    if where is not None:
        _write_config(where, resolved)
    elif "--debug_dataset" in taken:
        from sfumato.train import plan

        plan.show(resolved.config, what.method, resolved.datasets, resolved.read, resolved.given)
    else:
        main.train(what.method, resolved)
    return 0


def _config_file(argv: list[str]) -> tuple[Path, list[str]]:
    """Where `--output_config` writes: the value of `--config_file`, and the words without it. Errors: `UserError`."""
    parser = flags.Parser(prog="--output_config", add_help=False, allow_abbrev=False)
    parser.add_argument("--config_file")
    found, rest = parser.parse_known_args(argv)
    if not found.config_file:
        raise UserError("--output_config: say with --config_file which file to write the settings to")
    path = Path(found.config_file).expanduser()
    path = path if path.suffix == ".toml" else Path(f"{path}.toml")
    if path.exists():
        raise UserError(f"--output_config: {path} is there already; name another file with --config_file")
    return path, rest


def _write_config(path: Path, resolved: flags.Resolved) -> None:
    from sfumato.formats.files import write_text

    write_text(path, flags.write_toml(resolved.config))
    print(f"{path}: all settings; train with them by --config_file {path}")


def resolve(script: str, argv: Sequence[str]) -> flags.Resolved:
    """A checked config from a kohya command line. Errors: one `UserError` with all mistakes."""
    what = scripts()[script]

    def adapt(given: dict[str, Given], report: Report) -> None:
        for name, value in what.settings.items():
            given[name] = Given(name, value, script, False, True)
        _adapt(what, given, report)

    found = flags.resolve_all(
        argv, what.method, prog=f"{script}.py", kohya=True, short=flags_of(what), defaults=what.defaults, adapt=adapt
    )
    found = _without_idle_defaults(found)
    family = found.config.family.family
    if family not in what.families:
        theirs = [
            f"{name}.py"
            for name, other in scripts().items()
            if other.method == what.method and family in other.families
        ]
        raise UserError(
            f"{script}.py is for the family {' or '.join(what.families)}, but the base model is of the family "
            f"{family}: "
            f"use {' or '.join([*theirs, f'`sfumato train {what.method}`'])}"
        )
    return found


def flags_of(script: Script) -> frozenset[str]:
    """The flags of a script, as far as its families have them; each may be shortened to what no other one begins
    with."""
    theirs = {name for family in script.families for name in options.of_family(family)}
    return frozenset({"config_file", *kohya_settings.flags(), *theirs, *options.common()} - OURS)


def _adapt(script: Script, given: dict[str, Given], report: Report) -> None:
    """kohya's ways of saying things, in ours."""
    _negative_is_never(given)
    if script.trains_text and "train_text_encoder" not in given:
        trains = _number(given.get("stop_text_encoder_training")) != 0
        given["train_text_encoder"] = Given("train_text_encoder", trains, "train_db", False, True)
        if not trains:
            del given["stop_text_encoder_training"]
    if script.method == "embedding":
        _named_as_the_word(given, report)
    _swapping(script, given, report)
    cached = next((given[name] for name in CACHED if name in given and given[name].value is not False), None)
    if cached and script.method == "network" and "network_train_unet_only" not in given:
        report.note(f"{cached}: no text encoder is trained while what they say is kept")
    if "logging_dir" in given and "log_with" not in given:
        _log_folder(given, report)
    for name, value in script.defaults.items():
        if name not in given:
            report.note(_default_used(name, value))


def _default_used(name: str, value: object) -> str:
    return f"--{name}: not given; kohya's default {value} is used"


def _without_idle_defaults(found: flags.Resolved) -> flags.Resolved:
    """Without the notice of a default where every folder of the dataset file says something else."""
    endings = {s.caption_extension for d in found.datasets for s in d.subsets}
    idle = (
        ()
        if DEFAULTS["caption_extension"] in endings
        else (_default_used("caption_extension", DEFAULTS["caption_extension"]),)
    )
    return replace(found, notices=tuple(n for n in found.notices if n not in idle))


def _negative_is_never(given: dict[str, Given]) -> None:
    """`stop_text_encoder_training -1`: the text encoder is not trained at all, our 0."""
    each = given.get("stop_text_encoder_training")
    if each is not None and (_number(each) or 0) < 0:
        given[each.key] = replace(each, value=0, flag=False, where=each.where or f"--{each.key}")


def _named_as_the_word(given: dict[str, Given], report: Report) -> None:
    """The result of an embedding is called as its word, and pickled, unless asked otherwise."""
    word = given.get("token_string")
    name = re.sub(r'[<>:"|?*]', "", str(word.value)) if word else ""
    for key, value in (("output_name", name), ("save_model_as", "pt")):
        if value and key not in given:
            given[key] = Given(key, value, "kohya's default", False, True)
            report.note(f"--{key}: not given; kohya's default {value} is used")


def _swapping(script: Script, given: dict[str, Given], report: Report) -> None:
    """`blocks_to_swap` as sd-scripts counts for these families (all of a script do alike), with what it needs here."""
    for name in SWAPS:
        each = given.get(name)
        if not each or not (number := _number(each)):
            continue
        where = each.where or f"--{each.key}"
        value = families.facts(script.families[0]).swapped(number) if name == "blocks_to_swap" else number
        if value != number:
            given[each.key] = replace(each, value=value, flag=False, where=where)
            report.note(f"{each} {number}: {value} of all blocks, as many as sd-scripts swaps by it")
        if script.method == "full" and "optimizer_state_on_cpu" not in given:
            given["optimizer_state_on_cpu"] = Given("optimizer_state_on_cpu", True, where, False, True)
            report.note(f"{each}: the optimizer's state waits in the CPU's memory as well (optimizer_state_on_cpu)")


def _number(given: Given | None) -> int | None:
    try:
        return int(given.value) if given is not None and isinstance(given.value, (int, str)) else None
    except ValueError:
        return None  # the check of types reports it


def _log_folder(given: dict[str, Given], report: Report) -> None:
    """kohya's logging_dir alone switches tensorboard on."""
    if find_spec("tensorboard"):
        given["log_with"] = replace(
            given["logging_dir"], key="log_with", value="tensorboard", flag=False, where=str(given["logging_dir"])
        )
    else:
        report.note(
            f"{given.pop('logging_dir')}: accepted, no effect: tensorboard is not installed (pip install tensorboard); "
            "LOG.jsonl is written"
        )


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1], sys.argv[2:]))
