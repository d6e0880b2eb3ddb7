"""An optimizer by kohya's name or by `module.Class`, and the weights that it wants to be judged by."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sfumato.config import OptimizerConfig
from sfumato.errors import UserError, nearest
from sfumato.optim import arguments, low_bits
from sfumato.optim.groups import Group

log = logging.getLogger(__name__)

_BITS = "bitsandbytes.optim"
_MORE = "pytorch_optimizer"
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
    "DAdaptation": f"{_MORE}.DAdaptAdam",
    "DAdaptAdamPreprint": f"{_MORE}.DAdaptAdam",
    "DAdaptAdaGrad": f"{_MORE}.DAdaptAdaGrad",
    "DAdaptAdam": f"{_MORE}.DAdaptAdam",
    "DAdaptAdan": f"{_MORE}.DAdaptAdan",
    "DAdaptLion": f"{_MORE}.DAdaptLion",
    "DAdaptSGD": f"{_MORE}.DAdaptSGD",
    "Prodigy": f"{_MORE}.Prodigy",
    # Not pytorch_optimizer's: that is another variant, with momentum and other argument names than kohya's command lines have.
    "AdaFactor": "transformers.optimization.Adafactor",
    "AdamWScheduleFree": f"{_MORE}.ScheduleFreeAdamW",
    "SGDScheduleFree": f"{_MORE}.ScheduleFreeSGD",
    "RAdamScheduleFree": f"{_MORE}.ScheduleFreeRAdam",
}
"""kohya's name -> class. Other names are looked for in torch.optim, then in pytorch_optimizer."""
_PRESETS: dict[str, dict[str, Any]] = {
    "SGDNesterov": {"momentum": 0.9, "nesterov": True},
    "SGDNesterov8bit": {"momentum": 0.9, "nesterov": True},
}
_SPELLINGS = {"decouple": "weight_decouple", "use_bias_correction": "bias_correction"}
"""Arguments of prodigyopt and dadaptation, which kohya's command lines have -> pytorch_optimizer's."""


def optimizer(config: OptimizerConfig, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The optimizer that `optimizer_type` and `optimizer_args` ask for.

    Errors: `UserError` for an unknown name or argument, a value that the class refuses, or a library that is not installed.
    """
    name, path = _resolve(config.optimizer_type)
    flag = f"optimizer_type {config.optimizer_type}"
    made_by = path.partition(".")[0]
    hint = "pip install 'sfumato[bitsandbytes]', or use AdamW, Lion or AdaFactor" if made_by == "bitsandbytes" else ""
    kind = arguments.find(flag, path, hint)
    args = arguments.renamed(arguments.literals("optimizer_args", config.optimizer_args), _SPELLINGS, kind)
    if "lr" in args:
        raise UserError("optimizer_args lr: set learning_rate instead")
    arguments.check("optimizer_args", args, kind, taken=("self", "params", "lr"), lax=path == config.optimizer_type)
    args = {**_PRESETS.get(name, {}), **args}
    rate: float | None = config.learning_rate
    if finds_own_rate(kind, args):
        rate = None
        log.warning("AdaFactor finds its own learning rate (relative_step=True); learning_rate acts only with relative_step=False")
    elif name.startswith(("DAdapt", "Prodigy")) and config.learning_rate <= 0.1:
        log.warning("%s scales learning_rate by a factor that it finds itself; %g is low, 1.0 is usual", name, config.learning_rate)
    try:
        made: torch.optim.Optimizer = kind([g for group in groups for g in group.for_torch()], lr=rate, **args)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{flag} with optimizer_args {' '.join(config.optimizer_args) or 'of its own'}: {e}") from e
    return made


def in_low_bits(optimizer: torch.optim.Optimizer, seed: int) -> torch.optim.Optimizer:
    """The same optimizer for weights held in bf16: it computes in fp32, and what it computed is rounded stochastically."""
    if has_modes(optimizer):
        raise UserError(f"full_bf16 does not go with {type(optimizer).__name__}: its averaged weights would be lost in rounding")
    low_bits.attach(optimizer, seed)
    return optimizer


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights to train with and the weights to use differ (schedule-free, arXiv:2405.15682)."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, the weights are those to use: to save or to draw with. Most optimizers have one kind of weights alone."""
    if not has_modes(optimizer):
        yield
        return
    held = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        training(optimizer)
        # There and back again is exact but for rounding: with this, saving leaves no trace in what is trained.
        with torch.no_grad():
            for p, own in held:
                p.copy_(own)


def training(optimizer: torch.optim.Optimizer) -> None:
    """The weights are those to train with."""
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each group as it acts: with the factor that Prodigy and D-Adaptation found, or AdaFactor's own."""
    return [_rate(optimizer, group) for group in optimizer.param_groups]


def finds_own_rate(kind: type[torch.optim.Optimizer], args: dict[str, Any]) -> bool:
    """Whether it is AdaFactor without a given rate."""
    return kind.__name__ == "Adafactor" and kind.__module__.startswith("transformers") and bool(args.get("relative_step", True))


def _rate(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    if finds_own_rate(type(optimizer), group):
        steps = max((int(optimizer.state[p].get("step", 1)) for p in group["params"] if p in optimizer.state), default=1)
        return float(min(1e-6 * steps if group["warmup_init"] else 1e-2, steps**-0.5))
    return float(group["lr"]) * float(group.get("d", 1.0))


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
    raise UserError(f"optimizer_type {name!r} is not known; there are {', '.join(NAMES)}, or `module.Class`{nearest(name, NAMES)}")
