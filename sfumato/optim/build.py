"""An optimizer by kohya's name or by `module.Class`, and the weights that it wants to be judged by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch

from sfumato.config import OptimizerConfig
from sfumato.errors import UserError, nearest
from sfumato.optim import arguments, bf16
from sfumato.optim.groups import Group

_BITS = "bitsandbytes.optim"
_MORE = "pytorch_optimizer"
_DADAPT = "dadaptation"
NAMES: dict[str, str] = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": f"{_BITS}.AdamW8bit",
    "PagedAdamW": f"{_BITS}.PagedAdamW",
    "PagedAdamW8bit": f"{_BITS}.PagedAdamW8bit",
    "PagedAdamW32bit": f"{_BITS}.PagedAdamW32bit",
    "Lion": f"{_MORE}.Lion",
    "Lion8bit": f"{_BITS}.Lion8bit",
    "PagedLion8bit": f"{_BITS}.PagedLion8bit",
    "SGDNesterov": "torch.optim.SGD",
    "SGDNesterov8bit": f"{_BITS}.SGD8bit",
    # The first form of the method, and both Adans: pytorch_optimizer has the first one not at all, and others give
    # other results.
    "DAdaptation": f"{_DADAPT}.experimental.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": f"{_DADAPT}.experimental.DAdaptAdamPreprint",
    "DAdaptAdaGrad": f"{_MORE}.DAdaptAdaGrad",
    "DAdaptAdam": f"{_MORE}.DAdaptAdam",
    "DAdaptAdan": f"{_DADAPT}.DAdaptAdan",
    "DAdaptAdanIP": f"{_DADAPT}.experimental.DAdaptAdanIP",
    "DAdaptLion": f"{_MORE}.DAdaptLion",
    "DAdaptSGD": f"{_MORE}.DAdaptSGD",
    "Prodigy": f"{_MORE}.Prodigy",
    # Not pytorch_optimizer's: that is another variant, with momentum and other argument names than kohya's command
    # lines have.
    "AdaFactor": "transformers.optimization.Adafactor",
    "AdamWScheduleFree": f"{_MORE}.ScheduleFreeAdamW",
    "SGDScheduleFree": f"{_MORE}.ScheduleFreeSGD",
    "RAdamScheduleFree": f"{_MORE}.ScheduleFreeRAdam",
}
"""kohya's name -> class. Other names are looked for in torch.optim, then in pytorch_optimizer."""
_PRESETS: dict[str, dict[str, Any]] = {
    "SGDNesterov": {"momentum": 0.9, "nesterov": True},
    "SGDNesterov8bit": {"momentum": 0.9, "nesterov": True},
    # dadaptation's own defaults.
    "DAdaptAdaGrad": {"eps": 1e-6},
    "DAdaptLion": {"betas": (0.9, 0.99), "weight_decouple": True},
    "DAdaptSGD": {"momentum": 0.0},
}
HOW = frozenset({"fused", "foreach", "capturable", "differentiable"})
"""Arguments of torch's own optimizers that say how they compute, and change nothing else."""
_HINTS = {
    "bitsandbytes": "pip install 'sfumato[bitsandbytes]', or use AdamW, Lion or AdaFactor",
    _DADAPT: "pip install 'sfumato[dadaptation]', or use DAdaptAdam (the method's later form) or Prodigy",
}
"""Library that may be missing -> what to do."""
_SPELLINGS = {"decouple": "weight_decouple", "use_bias_correction": "bias_correction"}
"""Arguments of prodigyopt and dadaptation, which kohya's command lines have -> pytorch_optimizer's."""


def optimizer(config: OptimizerConfig, groups: Sequence[Group], *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer that `optimizer_type` and `optimizer_args` ask for. `fused`: one kernel does the step of many
    weights, where torch has it, unless the arguments say otherwise.

    Errors: `UserError` for an unknown name or argument, a value that the class refuses, or a library that is not
    installed.
    """
    name, path = _resolve(config.optimizer_type)
    flag = f"optimizer_type {config.optimizer_type}"
    kind = arguments.find(flag, path, _HINTS.get(path.partition(".")[0], ""))
    # Asked before it is called: what is called here may run any code.
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
        raise UserError(
            f"{flag}: expected the class of an optimizer, a subclass of torch.optim.Optimizer; {path} is not one"
        )
    args = settings(config, kind)
    if fused and kind.__module__.startswith("torch.optim") and not HOW & args.keys():
        args |= {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
    try:
        made: torch.optim.Optimizer = cast(Any, kind)(
            [g for group in groups for g in group.for_torch()],
            lr=None if finds_own_rate(kind, args) else config.learning_rate,
            **{**_PRESETS.get(name, {}), **args},
        )
    # A class of any library may report wrong arguments by an error of any kind.
    except Exception as e:
        raise UserError(f"{flag} with optimizer_args {' '.join(config.optimizer_args) or 'of its own'}: {e}") from e
    return made


def settings(config: OptimizerConfig, kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """`optimizer_args` in the names that the class has. Errors: `UserError` for what it does not have, or what would do
    nothing."""
    args = spelled(arguments.literals("optimizer_args", config.optimizer_args), kind)
    if "lr" in args:
        raise UserError("optimizer_args lr: set learning_rate instead")
    arguments.check("optimizer_args", args, kind, taken=("self", "params", "lr"), lax="." in config.optimizer_type)
    if kind.__name__ == "Prodigy" and args.get("weight_decay") and args.get("weight_decouple") is False:
        raise UserError(
            "optimizer_args decouple=False: Prodigy would decay nothing; leave decouple=False or weight_decay out"
        )
    return args


def spelled(args: Mapping[str, Any], kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Arguments in the names of the class, from those of other libraries that kohya's command lines have."""
    return arguments.renamed(args, _SPELLINGS, kind)


def in_low_bits(optimizer: torch.optim.Optimizer, seed: int, *, kahan: bool = False) -> torch.optim.Optimizer:
    """The same optimizer for weights in bf16: it computes in fp32, and what it computed is rounded
    stochastically, or (`kahan`) so that what rounding takes away is kept for the next step."""
    if has_modes(optimizer):
        raise UserError(
            f"full_bf16 does not go with {type(optimizer).__name__}: its averaged weights would be lost in rounding"
        )
    bf16.attach(optimizer, seed, kahan=kahan)
    return optimizer


def has_modes(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> bool:
    """Whether the weights to train with and the weights to use differ (schedule-free, arXiv:2405.15682)."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def at_once(act: Callable[[], None]) -> None:
    """Call `act` on all weights together."""
    act()


@contextmanager
def evaluating(
    optimizer: torch.optim.Optimizer, each: Callable[[Callable[[], None]], None] = at_once
) -> Iterator[None]:
    """Within, the weights are those to save or to sample with. Most optimizers have one kind of weights alone. `each`
    calls a function of the optimizer on its weights."""
    if not has_modes(optimizer):
        yield
        return
    trained = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    each(optimizer.eval)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        each(optimizer.train)  # type: ignore[attr-defined]
        # There and back again is exact but for rounding: with this, saving leaves no trace in what is trained.
        with torch.no_grad():
            for p, own in trained:
                p.copy_(own)


def training(optimizer: torch.optim.Optimizer) -> None:
    """The weights are those to train with."""
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each group as it acts: with the factor that Prodigy and D-Adaptation found, or AdaFactor's
    own."""
    return [_rate(optimizer, group) for group in optimizer.param_groups]


def finds_own_rate(kind: type[torch.optim.Optimizer], args: dict[str, Any]) -> bool:
    """Whether it is AdaFactor without a given rate."""
    return (
        kind.__name__ == "Adafactor"
        and kind.__module__.startswith("transformers")
        and bool(args.get("relative_step", True))
    )


def takes_one_rate(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether the rate of the first group acts on all: the search for the rate is one for all weights."""
    return kind.__module__.startswith((_MORE, _DADAPT)) and kind.__name__.startswith(("DAdapt", "Prodigy"))


def _rate(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    if finds_own_rate(type(optimizer), group):
        steps = max(
            (int(optimizer.state[p].get("step", 1)) for p in group["params"] if p in optimizer.state), default=1
        )
        return float(min(1e-6 * steps if group["warmup_init"] else 1e-2, steps**-0.5))
    lead = optimizer.param_groups[0] if takes_one_rate(type(optimizer)) else group
    return float(lead["lr"]) * float(group.get("d", 1.0))


def _resolve(name: str) -> tuple[str, str]:
    """`optimizer_type` -> (its name, where its class is)."""
    by_lower = {n.lower(): n for n in NAMES}
    if own := by_lower.get(name.lower()):
        return own, NAMES[own]
    if "." in name:
        return name.rpartition(".")[2], name
    if isinstance(getattr(torch.optim, name, None), type):
        return name, f"torch.optim.{name}"
    import pytorch_optimizer

    if isinstance(getattr(pytorch_optimizer, name, None), type):
        return name, f"{_MORE}.{name}"
    raise UserError(
        f"optimizer_type {name!r} is not known; there are {', '.join(NAMES)}, or `module.Class`{nearest(name, NAMES)}"
    )
