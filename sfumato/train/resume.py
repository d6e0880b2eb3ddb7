"""What a run is, as its states record it, and whether another run may resume from one: reported or refused early, from
`facts.json` alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato import families
from sfumato.adapters import AdapterPlan
from sfumato.config import Config, DatasetConfig
from sfumato.data.plan import Plan
from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats import run as runs
from sfumato.formats.lazy import Lazy
from sfumato.models.components import Checkpoint, ComponentWeights
from sfumato.optim import arguments, build, schedules
from sfumato.optim.trial import Trial
from sfumato.train import checkpoints, dist, hub
from sfumato.train.progress import console

_NOT_COMPARED = ("model", "data", "output", "metadata", "hub", "memory", "sample", "validation", "log")
"""Sections that do not change what is trained, or are compared by what they name: the base model, the datasets."""
_COMPARED_APART = (
    "max_train_steps", "max_train_epochs", "initial_step", "initial_epoch", "num_last_block_to_freeze",
    "max_data_loader_n_workers", "persistent_data_loader_workers",
    "mixed_precision", "optimizer_type", "optimizer_args", "ema_decay",
    "network_module", "network_dim", "network_weights", "dim_from_weights", "init_word", "weights",
    "controlnet_model_name_or_path",
)  # fmt: skip
"""Settings that change nothing, or have a message of their own."""
_STARTS = (
    ("network", "network_weights"),
    ("embedding", "init_word"),
    ("embedding", "weights"),
    ("control", "controlnet_model_name_or_path"),
)
"""Sections and settings of what a run starts from."""
_QUANTISING = (
    "quantize", "quantize_text_encoders", "quantize_budget", "int8_matmul", "fp8_base", "fp8_base_unet", "fp8_scaled",
)  # fmt: skip
"""What of "memory" changes the numbers that are computed."""
_AT_START = ("d0",)
"""Arguments that act when a run begins, and never after."""


def resolve_auto(config: Config) -> Config:
    """The config with the newest state's folder in place of `auto`, or with None where there is no state yet, which is
    printed; or with the state on the hub that is named, downloaded."""
    config = hub.with_state(config)
    output = config.output
    if output.resume != "auto":
        return config
    found = runs.newest(output.output_dir, checkpoints.states_of(output.output_name))
    if found is None:
        console.print(f"resume auto: no state of {output.output_name!r} in {output.output_dir}; starting at step 0")
    return replace(config, output=replace(output, resume=None if found is None else str(found)))


def identity(config: Config, plan: AdapterPlan | None, source: Checkpoint) -> dict[str, Any]:
    """What a run is, in JSON's values: its settings, the base model and what is trained."""
    files = {component.flag for component in families.of(config.family).components}
    settings = as_json(asdict(config))
    settings["family"] = {name: value for name, value in (settings["family"] or {}).items() if name not in files}
    return {
        "config": settings,
        "precision": dist.precision(config.train.mixed_precision),
        "base": {name: _digest(weights) for name, weights in source.components.items()},
        "adapter": {"kind": plan.kind.__name__, "rank": plan.rank, "conv_rank": plan.conv_rank} if plan else None,
    }


def check(
    config: Config, plan: AdapterPlan | None, source: Checkpoint, tried: Trial, weights: Mapping[str, nn.Parameter]
) -> list[str]:
    """A line for each difference to the state that `resume` names. `weights`: what is trained, by name. Errors:
    `UserError` for what a resumed run cannot change."""
    if config.output.resume is None:
        return []
    folder = Path(config.output.resume)
    runs.check_whole(folder)
    facts = read_facts(folder)
    refused = _other_optimizer(config, facts, tried)
    saved, now = facts.get("identity"), identity(config, plan, source)
    notices = []
    if not isinstance(saved, dict):
        notices.append(
            "the state is of an older sfumato, which did not keep the settings: what has changed since then is not "
            "known"
        )
    else:
        try:
            refused += _other_base(config, saved, now, source) + _other_adapter(config, saved, now, facts, tried)
            notices += changes(saved, now, type(tried.optimizer))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"resume {folder}: facts.json is damaged ({error!r})") from error
    refused = refused or _other_weights(folder, facts, tried, weights)
    if refused:
        raise UserError(*(f"resume {folder}: {each}" for each in dict.fromkeys(refused)))
    return [f"resume: {notice}" for notice in notices]


def read_facts(folder: Path) -> dict[str, Any]:
    """The plain values of a state. Errors: `UserError` if there is no sound state."""
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError
    except (ValueError, OSError, RecursionError) as error:
        why = "facts.json is damaged" if folder.is_dir() else "no such folder"
        why = "it has no facts.json" if isinstance(error, FileNotFoundError) and folder.is_dir() else why
        raise UserError(f"{folder}: cannot resume from this state: {why}") from error
    return facts


def check_left(config: Config, steps: int) -> None:
    """Errors: `UserError` if the state that `resume` names has no step left to do of `steps`."""
    if config.output.resume is None:
        return
    done = read_facts(Path(config.output.resume)).get("step")
    if isinstance(done, int) and done >= steps:
        raise UserError(
            f"resume {config.output.resume}: {done} steps are done, of {steps} in all; raise --max_train_steps or "
            "--max_train_epochs"
        )


# --- what is refused ---


def _other_optimizer(config: Config, facts: Mapping[str, Any], tried: Trial) -> list[str]:
    """A state's moments are those of one class, with the arguments that shape them."""
    name, packed = config.optimizer.optimizer_type, facts.get("optimizer")
    before = facts.get("optimizer_class")
    if before is not None and before != path_of(tried.optimizer):
        return [f"the optimizer was {before} and is now {path_of(tried.optimizer)}; set that again"]
    try:
        entries = runs.unpack(packed, defaultdict[str, Any](lambda: None))["state"].values()
        found = {key for each in entries for key in each}
    except (LookupError, TypeError, AttributeError, ValueError):
        return ["its record of the optimizer is damaged"]
    needed = {key for each in tried.optimizer.state.values() for key in each}
    if tried.stepped and found and (lacking := sorted(needed - found)):
        return [
            f"{name} needs {', '.join(lacking)} in it; was it of another optimizer, or were other optimizer_args used?"
        ]
    return []


def _other_base(config: Config, saved: Mapping[str, Any], now: Mapping[str, Any], source: Checkpoint) -> list[str]:
    then = saved["base"]
    changed = [name for name, digest in now["base"].items() if name != "vae" and then.get(name, digest) != digest]
    if not changed:
        return []
    where = ", ".join(dict.fromkeys(str(source.components[name].where) for name in changed))
    cure = "with the result as network_weights" if now["adapter"] else "from the result"
    return [
        f"{where} is not the model that the run began with ({', '.join(changed)}); give that one, or start anew {cure}"
    ]


def _other_adapter(
    config: Config, saved: Mapping[str, Any], now: Mapping[str, Any], facts: Mapping[str, Any], tried: Trial
) -> list[str]:
    then, adapter = saved["adapter"], now["adapter"]
    if (then is None) != (adapter is None):
        return [f"it is of a run that trained {'no' if then is None else 'an'} adapter"]
    if adapter is None:
        return _other_blocks(saved, now)
    flags = {"kind": "network_module", "rank": "network_dim", "conv_rank": "conv_dim"}
    fixed = (
        ("kind",) if config.network.dim_from_weights or saved["config"]["network"]["dim_from_weights"] else tuple(flags)
    )
    out = [
        f"{flags[key]} was {_shown(then[key])} and is now {_shown(adapter[key])}; it cannot change"
        for key in fixed
        if then[key] != adapter[key]
    ]
    names, groups = [
        [g.get("name") for g in gs] for gs in (facts["optimizer"]["param_groups"], tried.optimizer.param_groups)
    ]
    if names != groups and not config.network.dim_from_weights:
        out.append(
            f"{', '.join(map(str, names))} was trained, {', '.join(map(str, groups))} is to be trained now; that "
            "cannot change"
        )
    return out


def _other_blocks(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A state holds the weights of the blocks that were trained."""
    name = "num_last_block_to_freeze"
    then, here = (each["config"]["train"].get(name) for each in (saved, now))
    return [] if then == here else [f"{name} was {_shown(then)} and is now {_shown(here)}; it cannot change"]


def _other_weights(
    folder: Path, facts: Mapping[str, Any], tried: Trial, weights: Mapping[str, nn.Parameter]
) -> list[str]:
    """A state's weights and moments are those of one net, in the same groups."""
    saved = {
        name: tuple(info.shape) for name, info in files.read_header(folder / "weights.safetensors").tensors.items()
    }
    here = {name: tuple(p.shape) for name, p in weights.items()}
    if odd := sorted(saved.keys() ^ here.keys()):
        return [f"{len(odd)} weights are in it or in this run alone, such as {odd[0]}; what is trained cannot change"]
    for name, shape in here.items():
        if saved[name] != shape:
            return [f"{name} has the shape {saved[name]} in it and {shape} in this run; it cannot change"]
    then, now = len(facts["optimizer"]["param_groups"]), len(tried.optimizer.param_groups)
    return [] if then == now else [f"its weights had {then} learning rates and have {now} now; that cannot change"]


# --- what is reported ---


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], kind: type[torch.optim.Optimizer]) -> list[str]:
    """A line for each setting that differs from the state's, with what that means."""
    then, here = saved["config"], now["config"]
    changed = partial("{} was {} and is now {}: it acts from here on".format)
    lines = [changed(name, _shown(a), _shown(b)) for name, a, b in _differing(then, here)]
    lines += [
        changed(f"optimizer_args {name}", *map(_shown, pair)) for name, pair in changed_args(then, here, kind).items()
    ]
    if (a := saved["precision"]) != (b := now["precision"]):
        lines.append(changed("mixed_precision", a, b))
    for section, name in _STARTS:
        if then.get(section, {}).get(name) != (start := here[section][name]) and start:
            lines.append(f"{name} {start} does not act: the weights are those of the state")
    if saved["base"].get("vae") != now["base"].get("vae"):
        lines.append("the VAE is another one: its latents are what is trained on from here on")
    before, after = then["optimizer"]["ema_decay"], here["optimizer"]["ema_decay"]
    if before and not after:
        lines.append("ema_decay is not set any more: the average so far is dropped")
    elif after and not before:
        lines.append("ema_decay is new: the moving average starts from the weights as they are now")
    elif before != after:
        lines.append(changed("ema_decay", before, after))
    return lines


def _differing(then: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(setting, old value, new value), of the settings that both have."""
    for section in sorted(here.keys() - set(_NOT_COMPARED) | {"memory"}):
        a, b = then.get(section) or {}, here[section] or {}
        names = a.keys() & b.keys() - set(_COMPARED_APART)
        for name in sorted(names & set(_QUANTISING) if section == "memory" else names):
            if a[name] != b[name]:
                yield name, a[name], b[name]


def changed_args(
    then: Mapping[str, Any] | None, here: Mapping[str, Any], kind: type[torch.optim.Optimizer]
) -> dict[str, tuple[Any, Any]]:
    """Argument of the optimizer -> (old, new value), None: the optimizer's own. `then`: None when it is not known.

    Errors: `UserError` for one that acts only when a run begins.
    """
    a, b = ({} if config is None else _args(config["optimizer"], kind) for config in (then, here))
    out = {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}
    if then is not None and (fixed := [name for name in out if name in _AT_START]):
        raise UserError(f"optimizer_args {fixed[0]}: it acts when a run begins, a resumed one cannot change it")
    return out


def _args(optimizer: Mapping[str, Any], kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    return build.spelled(arguments.literals("optimizer_args", optimizer["optimizer_args"]), kind)


def planned(config: Config, plan: Plan, steps_per_epoch: int, steps: int) -> list[str]:
    """A line for each difference of the images to the state that `resume` names, for who trains nothing. Errors:
    `UserError`."""
    if (folder := config.output.resume) is None:
        return []
    try:
        lines = image_changes(config, read_facts(Path(folder)), plan, steps_per_epoch, steps)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"resume {folder}: facts.json is damaged ({error!r})") from error
    return [f"resume: {line}" for line in lines]


def image_changes(config: Config, facts: Mapping[str, Any], plan: Plan, steps_per_epoch: int, steps: int) -> list[str]:
    """What only the images show, and what a state of an older sfumato records. Errors: as a damaged state gives."""
    out = []
    if facts["dataset"] != plan.digest():
        out.append(f"the dataset has changed ({facts['steps_per_epoch']} steps an epoch then, {steps_per_epoch} now)")
    if "identity" not in facts and facts["seed"] != config.train.seed:
        out.append(f"the seed was {facts['seed']} and is now {config.train.seed}")
    out += dataset_changes(facts.get("datasets", []), plan.datasets)
    return out + length_change(facts.get("steps"), steps, config)


def dataset_changes(saved: Sequence[Any], datasets: Sequence[DatasetConfig]) -> list[str]:
    """A line for each option of a dataset or folder that differs from the state's; [] where they cannot be compared."""
    here = as_json([asdict(d) for d in datasets])
    if len(saved) != len(here) or any(len(a["subsets"]) != len(b["subsets"]) for a, b in zip(saved, here, strict=True)):
        return []
    pairs = [(a, b) for a, b in zip(saved, here, strict=True)]
    pairs += [pair for a, b in pairs for pair in zip(a["subsets"], b["subsets"], strict=True)]
    skipped = ("subsets", "image_dir", "conditioning_data_dir", "metadata_file")
    found = [
        f"{name} was {_shown(a[name])} and is now {_shown(b[name])}: it acts from here on"
        for a, b in pairs
        for name in a.keys() & b.keys()
        if name not in skipped and a[name] != b[name]
    ]
    return sorted(set(found))


def length_change(saved: object, steps: int, config: Config) -> list[str]:
    """A schedule that goes over another number of steps than before."""
    if not isinstance(saved, int) or saved == steps or not schedules.has_schedule(config.optimizer):
        return []
    return [
        f"the run had {saved} steps in all and has {steps} now: {config.optimizer.lr_scheduler} goes over the new "
        "number"
    ]


# --- values ---


def as_json(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def path_of(optimizer: torch.optim.Optimizer) -> str:
    """`module.Class` of an optimizer."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _shown(value: Any) -> str:
    if value in (None, [], {}):
        return "not set"
    return " ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)


def _digest(weights: ComponentWeights) -> str:
    """Hash of a net's names, shapes, formats and first numbers: it distinguishes trainings without reading all of
    a file."""
    tensors, shapes, digest = weights.tensors, weights.tensors.shapes, blake2b(digest_size=16)
    for name in sorted(tensors):
        first = _first(tensors, name)
        digest.update(f"{name}\0{first.dtype}\0{shapes[name]}\0".encode())
        digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _first(tensors: Lazy, name: str) -> torch.Tensor:
    file, theirs = tensors.places[name]
    return file.mapped(theirs).reshape(-1)[:64].contiguous()
