"""How learning rates move: a pure function of the optimizer step, so that resuming needs the step alone.

The curves are those of transformers and diffusers, which kohya's flags name.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler

from sfumato.config import OptimizerConfig
from sfumato.errors import UserError
from sfumato.optim import arguments
from sfumato.optim.build import finds_own_rate, has_modes

Curve = Callable[[int], float]
"""Optimizer steps done -> factor on the learning rate."""


class Schedule(Protocol):
    """Sets the rates of an optimizer's groups."""

    def step(self) -> None:
        """One more optimizer step is done."""
        ...

    def to(self, done: int) -> None:
        """So many optimizer steps are done."""
        ...


def schedule(config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int) -> Schedule:
    """The schedule that the config asks for, over `steps` optimizer steps, at step 0.

    Errors: `UserError` for arguments that the schedule does not have, and for a schedule that another optimizer has.
    """
    if (
        config.lr_scheduler == "adafactor"
        and not config.lr_scheduler_type
        and not finds_own_rate(type(optimizer), optimizer.defaults)
    ):
        raise UserError("lr_scheduler adafactor is for optimizer_type AdaFactor with relative_step=True")
    config = acting(config, optimizer)
    return _Class(config, optimizer) if config.lr_scheduler_type else _Curve(curve(config, steps), optimizer)


def acting(config: OptimizerConfig, optimizer: torch.optim.Optimizer) -> OptimizerConfig:
    """The config with the schedule that acts: none with an optimizer that finds its own rate, or averages where others
    lower the rate."""
    if not (finds_own_rate(type(optimizer), optimizer.defaults) or has_modes(optimizer)) or not has_schedule(config):
        return config
    return replace(config, lr_scheduler="constant", lr_scheduler_type=None, lr_scheduler_args=())


def has_schedule(config: OptimizerConfig) -> bool:
    """Whether a schedule is asked for that moves the rate."""
    return config.lr_scheduler_type is not None or config.lr_scheduler not in ("constant", "adafactor")


def warms_up(config: OptimizerConfig) -> bool:
    """Whether `lr_warmup_steps` acts."""
    return not config.lr_scheduler_type and "warmup" in inspect.signature(CURVES[config.lr_scheduler]).parameters


def curve(config: OptimizerConfig, steps: int) -> Curve:
    """The factor that `lr_scheduler` and its options ask for, over `steps` optimizer steps."""
    make = CURVES[config.lr_scheduler]
    parameters = inspect.signature(make).parameters
    flags = {
        "steps": steps,
        "warmup": share("lr_warmup_steps", config.lr_warmup_steps, steps),
        "decay": share("lr_decay_steps", config.lr_decay_steps, steps),
        "rate": config.learning_rate,
    }
    options = _options(config)
    given = arguments.literals("lr_scheduler_args", config.lr_scheduler_args)
    arguments.check("lr_scheduler_args", given, make, taken=flags)
    args = {k: v for k, v in (flags | options).items() if k in parameters} | given
    try:
        made: Curve = make(**args)
        for step in (0, steps // 2, steps):
            made(step)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as e:
        raise UserError(f"lr_scheduler {config.lr_scheduler}: its arguments do not go together ({e})") from e
    return made


def share(flag: str, value: int | float | str, steps: int) -> int:
    """Steps, as a number, a share of the run below 1, or a percentage. Errors: `UserError` for what is none of them."""
    try:
        text = str(value).strip()
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if (
            number < 0
            or not math.isfinite(number)
            or (number > 1 if text.endswith("%") else number >= 1 and number % 1)
        ):
            raise ValueError
    except ValueError:
        raise UserError(
            f'{flag} {value!r}: expected steps (100), a share of the run (0.1) or a percentage ("10%")'
        ) from None
    return int(number * steps) if number < 1 or text.endswith("%") else int(number)


def _options(config: OptimizerConfig) -> dict[str, Any]:
    """kohya's flags -> arguments of curves; those that a curve does not have are left out by the caller."""
    cycles = config.lr_scheduler_num_cycles
    options: dict[str, Any] = {"power": config.lr_scheduler_power, "timescale": config.lr_scheduler_timescale}
    if config.lr_scheduler == "cosine_with_restarts":
        options["num_cycles"] = cycles
    elif config.lr_scheduler != "cosine":
        # Here a cycle goes down and up again, and one descent is asked for.
        options["num_cycles"] = cycles / 2
    if (floor := config.lr_scheduler_min_lr_ratio) is not None:
        options |= {"min_lr_rate": floor, "min_lr_ratio": floor}
    return options


def _warmed(warmup: int, then: Curve) -> Curve:
    """Linear from 0, then another curve."""
    return lambda step: step / warmup if step < warmup else then(step)


def _cosine(progress: float, num_cycles: float) -> float:
    """1 at the start, 0 after half a cycle."""
    return 0.5 * (1 + math.cos(math.pi * num_cycles * 2 * progress))


def _constant() -> Curve:
    return lambda step: 1.0


def _constant_with_warmup(warmup: int) -> Curve:
    return _warmed(warmup, _constant())


def _linear(steps: int, warmup: int) -> Curve:
    return _warmed(warmup, lambda step: max(0.0, (steps - step) / max(1, steps - warmup)))


def _cosine_half(steps: int, warmup: int, num_cycles: float = 0.5) -> Curve:
    return _warmed(warmup, lambda step: max(0.0, _cosine((step - warmup) / max(1, steps - warmup), num_cycles)))


def _cosine_with_restarts(steps: int, warmup: int, num_cycles: int = 1) -> Curve:
    def at(step: int) -> float:
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.0 if progress >= 1 else max(0.0, _cosine((num_cycles * progress) % 1.0, 0.5))

    return _warmed(warmup, at)


def _polynomial(steps: int, warmup: int, rate: float, power: float = 1.0, lr_end: float = 1e-7) -> Curve:
    if rate <= lr_end:
        raise ValueError(f"learning_rate {rate:g} is not above lr_end {lr_end:g}")

    def at(step: int) -> float:
        left = max(0.0, 1 - (step - warmup) / max(1, steps - warmup))
        return float((rate - lr_end) * left**power + lr_end) / rate

    return _warmed(warmup, at)


def _inverse_sqrt(warmup: int, timescale: int | None = None) -> Curve:
    scale = timescale or warmup or 10_000
    return _warmed(warmup, lambda step: 1 / math.sqrt((step + scale - warmup) / scale))


def _cosine_with_min_lr(
    steps: int,
    warmup: int,
    rate: float,
    num_cycles: float = 0.5,
    min_lr_rate: float | None = None,
    min_lr: float | None = None,
) -> Curve:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError("set one of lr_scheduler_min_lr_ratio and min_lr in lr_scheduler_args")
    floor = min_lr_rate if min_lr is None else min_lr / rate
    assert floor is not None
    return _warmed(
        warmup,
        lambda step: max(0.0, _cosine((step - warmup) / max(1, steps - warmup), num_cycles) * (1 - floor) + floor),
    )


def _warmup_stable_decay(
    steps: int,
    warmup: int,
    decay: int,
    num_cycles: float = 0.5,
    min_lr_ratio: float = 0.0,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
) -> Curve:
    """Linear up, level, down; the floor holds for the warm-up as well (arXiv:2404.06395)."""
    if warmup + decay > steps:
        raise ValueError(f"lr_warmup_steps {warmup} and lr_decay_steps {decay} are more than the {steps} steps in all")
    down: dict[str, Callable[[float], float]] = {
        "linear": lambda p: 1 - p,
        "cosine": lambda p: _cosine(p, num_cycles),
        "1-sqrt": lambda p: 1 - math.sqrt(p),
    }
    up: dict[str, Callable[[float], float]] = {
        "linear": lambda p: p,
        "cosine": lambda p: 0.5 * (1 - math.cos(math.pi * p)),
        "1-sqrt": lambda p: 1 - math.sqrt(1 - p),
    }
    if unknown := [t for t in (warmup_type, decay_type) if t not in up]:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(up)}")

    def at(step: int) -> float:
        if warmup <= step < steps - decay:
            return 1.0
        if step >= steps:
            return min_lr_ratio
        factor = up[warmup_type](step / warmup) if step < warmup else down[decay_type]((step - steps + decay) / decay)
        return max(0.0, factor * (1 - min_lr_ratio) + min_lr_ratio)

    return at


def _piecewise_constant(step_rules: str = "") -> Curve:
    """`1:10,0.1:20,0.01`: factor 1 up to step 10, then 0.1 up to step 20, then 0.01."""
    if not step_rules:
        raise ValueError(
            'set lr_scheduler_args step_rules="1:10,0.1:20,0.01": factor 1 up to step 10, 0.1 up to step 20, then 0.01'
        )
    *rules, last = step_rules.split(",")
    ends = sorted((int(end), float(factor)) for factor, end in (r.split(":") for r in rules))
    return lambda step: next((factor for end, factor in ends if step < end), float(last))


CURVES: dict[str, Callable[..., Curve]] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "linear": _linear,
    "cosine": _cosine_half,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
    "piecewise_constant": _piecewise_constant,
    "adafactor": _constant,
}
"""`lr_scheduler` -> its curve."""


class _Curve:
    """A schedule that is a curve."""

    def __init__(self, factor: Curve, optimizer: torch.optim.Optimizer) -> None:
        self.factor, self.optimizer, self.done = factor, optimizer, 0
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.to(0)

    def step(self) -> None:
        self.to(self.done + 1)

    def to(self, done: int) -> None:
        self.done = done
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * self.factor(done)


class _Class:
    """A schedule that is a class of torch or of the user's own; `to` plays it through from the start."""

    def __init__(self, config: OptimizerConfig, optimizer: torch.optim.Optimizer) -> None:
        name = config.lr_scheduler_type or ""
        kind = arguments.find(f"lr_scheduler_type {name}", name if "." in name else f"torch.optim.lr_scheduler.{name}")
        if (
            not (isinstance(kind, type) and issubclass(kind, LRScheduler))
            or kind is torch.optim.lr_scheduler.ReduceLROnPlateau
        ):
            raise UserError(
                f"lr_scheduler_type {name}: expected a schedule that goes by the step (a subclass of torch's "
                "LRScheduler)"
            )
        args = arguments.literals("lr_scheduler_args", config.lr_scheduler_args)
        arguments.check("lr_scheduler_args", args, kind, taken=("self", "optimizer"), lax=True)
        self.optimizer = optimizer
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.make: Callable[[], LRScheduler] = lambda: kind(optimizer, **args)
        try:
            self.to(0)
        except Exception as e:
            raise UserError(
                f"lr_scheduler_type {name} with lr_scheduler_args "
                f"{' '.join(config.lr_scheduler_args) or 'of its own'}: {e}"
            ) from e

    def step(self) -> None:
        self.made.step()

    def to(self, done: int) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = group["initial_lr"] = base
        with warnings.catch_warnings():
            # torch warns where a schedule moves before the optimizer has; here that is meant.
            warnings.simplefilter("ignore", UserWarning)
            self.made = self.make()
            for _ in range(done):
                self.made.step()
