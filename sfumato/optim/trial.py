"""An optimizer and its schedule tried on stand-in weights: what is wrong with them is found before a model is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor, nn

from sfumato.config import OptimizerConfig
from sfumato.errors import UserError
from sfumato.formats import run as runs
from sfumato.optim import build, schedules
from sfumato.optim.fused import FusedStep
from sfumato.optim.groups import Group

_LONG = 10**9
"""Steps of a run whose length is not known yet: any number of warm-up steps fits in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a trial showed."""

    optimizer: torch.optim.Optimizer
    """As it is after a step."""
    stepped: bool
    """Whether it made a step; those of bitsandbytes need a GPU for it."""
    notices: tuple[str, ...]
    """What a user should know."""


def trial(
    config: OptimizerConfig, groups: Sequence[Group], *, low_bits: bool = False, steps: int | None = None
) -> Trial:
    """Build the optimizer, let it make a step, check that its state can be saved, and put the schedule on it.

    `groups`: those of the run or `stand_in`s of them; their weights are not touched. `steps`: of the run, if that is
    known. Errors: `UserError` for whatever the user asked for that cannot work.
    """
    optimizer = build.optimizer(config, [_copied(group) for group in groups])
    if low_bits:
        build.in_low_bits(optimizer, 0)
    schedules.schedule(config, optimizer, steps or _LONG)
    stepped = not type(optimizer).__module__.startswith("bitsandbytes")
    if stepped:
        _step(config, optimizer)
    return Trial(
        optimizer=optimizer,
        stepped=stepped,
        notices=(*_rates(config, optimizer, groups), *_schedule(config, optimizer, steps)),
    )


def for_length(config: OptimizerConfig, steps: int) -> list[str]:
    """Notices on a run of so many steps, for one whose length was not known to `trial`. Errors: `UserError` as
    there."""
    optimizer = build.optimizer(config, [stand_in("", config.learning_rate)])
    schedules.schedule(config, optimizer, steps)
    return _warmup(schedules.acting(config, optimizer), optimizer, steps)


def steps_alone(config: OptimizerConfig, groups: Sequence[Group]) -> bool:
    """Whether a weight's step depends on its own gradient alone, so that it may come before the others are there: it is
    tried on stand-ins of these groups' weights."""
    plain, apart = (build.optimizer(config, [_doubled(group) for group in groups]) for _ in range(2))
    if type(plain).__module__.startswith("bitsandbytes"):
        return True
    if build.takes_one_rate(type(plain)):
        return False
    weights = [[p for group in each.param_groups for p in group["params"]] for each in (plain, apart)]
    step = FusedStep(apart, [[p] for p in weights[1]], device=torch.device("cpu"), in_backward=False)
    generator = torch.Generator().manual_seed(0)

    def gradients() -> Tensor:
        # Of any size: what is clipped together shows.
        for scale, p, q in zip(cycle((1e-3, 1.0, 30.0)), *weights):
            p.grad = scale * torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        return torch.zeros(())

    build.training(plain)
    build.training(apart)
    try:
        for _ in range(4):
            step.step(gradients, torch.amp.GradScaler("cpu", enabled=False), lambda: None)
            plain.step()
        return all(torch.allclose(p, q, rtol=1e-4, atol=1e-6) for p, q in zip(*weights, strict=True))
    # What a class does with fewer weights than it was made for is its own.
    except Exception:
        return False


def state_bytes(config: OptimizerConfig) -> float:
    """Bytes that the optimizer remembers for each number of a weight; as of AdamW8bit where it cannot be tried."""
    p = nn.Parameter(torch.ones(64, 128))
    p.grad = torch.full_like(p, 1e-3)
    try:
        optimizer = build.optimizer(config, [Group(name="", lr=config.learning_rate, parameters=[p])])
        build.training(optimizer)
        optimizer.step()
    # Some need an accelerator, or weights of other shapes.
    except Exception:
        return 2.0  # too little does no harm
    return sum(t.nbytes for t in optimizer.state[p].values() if isinstance(t, Tensor)) / p.numel()


def _doubled(group: Group) -> Group:
    """Stand-ins of a group's weights, two of each."""
    first, second = _copied(group), _copied(group)
    return replace(first, parameters=[*first.parameters, *second.parameters], plus=[*first.plus, *second.plus])


def stand_in(name: str, lr: float) -> Group:
    """A group of small weights."""
    return Group(name=name, lr=lr, parameters=[nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))])


def _copied(group: Group) -> Group:
    """The same with small weights of its own, one for each number of dimensions."""
    chosen = {p.ndim: p for p in reversed(group.parameters)}
    fast = {id(p) for p in group.plus}
    made = [
        (nn.Parameter(torch.ones([min(n, 4) for n in p.shape])), id(p) in fast)
        for p in [*chosen.values(), *group.plus[:1]]
    ]
    return replace(group, parameters=[p for p, _ in made], plus=[p for p, plus in made if plus])


def _step(config: OptimizerConfig, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, 1e-3)
    try:
        build.training(optimizer)
        optimizer.step()
        packed, tensors = runs.pack(optimizer.state_dict())
        optimizer.load_state_dict(runs.unpack(packed, tensors))
    # Classes of any library fail in ways of their own.
    except Exception as e:
        raise UserError(
            f"optimizer_type {config.optimizer_type}: it cannot make a plain step whose state can be saved ({e}); "
            "choose another one"
        ) from e


def _rates(config: OptimizerConfig, optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> list[str]:
    """Of rates that do not act, or look like those of another optimizer."""
    kind, name = type(optimizer), config.optimizer_type
    used = {each["name"]: each["lr"] for group in groups for each in group.for_torch()}
    values = set(used.values())
    shown = (
        f"{next(iter(values)):g}"
        if len(values) == 1
        else ", ".join(f"{rate:g} ({part})" for part, rate in used.items())
    )
    if build.finds_own_rate(kind, optimizer.defaults):
        return [
            f"{name} finds its own learning rate (relative_step=True); {shown} does not act, it would with "
            "relative_step=False"
        ]
    out = []
    if build.takes_one_rate(kind):
        first = next(iter(used.values()))
        if len(values) > 1:
            out.append(f"{name} has one learning rate for all that is trained: of {shown} it is the first that acts")
        if first <= 0.1:
            out.append(
                f"{name} scales the learning rate by a factor that it finds itself; {first:g} is low, 1.0 is usual"
            )
    return out


def _schedule(config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int | None) -> list[str]:
    """Of schedules that do not act, and of warm-ups that do not end."""
    acting, out = schedules.acting(config, optimizer), []
    if acting != config:
        why = (
            "it finds its own learning rate"
            if not build.has_modes(optimizer)
            else "its average takes the place of a schedule"
        )
        flag = (
            f"lr_scheduler_type {config.lr_scheduler_type}"
            if config.lr_scheduler_type
            else f"lr_scheduler {config.lr_scheduler}"
        )
        own = "; a warm-up goes by optimizer_args warmup_steps=" if "warmup_steps" in optimizer.defaults else ""
        out.append(f"{flag} does not act with {config.optimizer_type}: {why}; the run goes without{own}")
    return out if steps is None else out + _warmup(acting, optimizer, steps)


def _warmup(acting: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int) -> list[str]:
    own = [group.get("warmup_steps", 0) for group in optimizer.param_groups]
    flags = {"optimizer_args warmup_steps": max((n for n in own if isinstance(n, int)), default=0)}
    if schedules.warms_up(acting):
        flags["lr_warmup_steps"] = schedules.share("lr_warmup_steps", acting.lr_warmup_steps, steps)
    return [
        f"{flag}: the warm-up takes {warmup} steps and the run has {steps}, so the full learning rate is never reached"
        for flag, warmup in flags.items()
        if warmup >= steps
    ]
