"""The optimizer's step in parts, as the config asks for it: put together, and checked before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sfumato.config import Config, OptimizerConfig
from sfumato.errors import UserError
from sfumato.memory.backends import backend
from sfumato.models.base import Models
from sfumato.optim.ema import EMA
from sfumato.optim.fused import FusedStep, Part, parts
from sfumato.optim.host import Copies, Shelf
from sfumato.optim.trial import Trial, state_bytes, steps_alone
from sfumato.train import dist
from sfumato.train.loop import Run
from sfumato.train.trainables import Trainable


def fused_step(
    config: Config, models: Models, trainable: Trainable, optimizer: torch.optim.Optimizer, device: torch.device
) -> FusedStep | None:
    """What the config asks for; None where all weights step at once."""
    o = config.optimizer
    if not (o.fused or o.optimizer_state_on_cpu):
        return None
    alone, weights = steps_alone(o, trainable.groups()), [p for group in trainable.groups() for p in group.parameters]
    gradients = o.fused and (_wait(config, alone) or config.train.gradient_accumulation_steps > 1)
    each = (state_bytes(o) if o.optimizer_state_on_cpu else 0) + (weights[0].element_size() if gradients else 0)
    return FusedStep(
        optimizer, _cut(o, optimizer, _blocks(models, trainable)), device=device,
        copies=_copies(device, weights, each), max_norm=o.max_grad_norm,
        clipping=o.fused_clipping, in_backward=o.fused, together=not alone,
        state_on_host=o.optimizer_state_on_cpu, kept=list(trainable.kept_gradients()),
    )  # fmt: skip


def streamed(run: Run) -> None:
    """Have trained weights of streamed blocks step while they are on the device."""
    if run.fused:
        for swap in run.swaps:
            run.fused.before.append(swap.bring)
            run.fused.after.append(swap.changed)
            swap.leaving.append(run.fused.flush)


def moving_average(config: OptimizerConfig, trainable: Trainable, device: torch.device) -> EMA | None:
    """The average that `ema_decay` asks for, on the host where the optimizer's state is."""
    if not config.ema_decay:
        return None
    weights = trainable.weights()
    shelf = Shelf(_copies(device, list(weights.values()), 4)) if config.optimizer_state_on_cpu else None
    return EMA(weights, config.ema_decay, shelf)


def _copies(device: torch.device, weights: Sequence[Tensor], each: float) -> Copies:
    """To the host and back, where `each` bytes wait for each number of the weights."""
    numbers = [p.numel() for p in weights]
    return backend(device, round(sum(numbers) * each), max(numbers) * 4)[0]


def average(run: Run) -> None:
    """Have the moving average take in weights as they step, while they are on the device."""
    if run.fused and run.ema:
        names = {p: name for name, p in run.trainable.weights().items()}
        run.fused.after.append(partial(_take, run.ema, names))


def _take(ema: EMA, names: dict[nn.Parameter, str], part: Part) -> None:
    ema.take({names[p]: p for p in part})


def _blocks(models: Models, trainable: Trainable) -> list[nn.Module]:
    family, nets = models.family, models.nets()
    own = [
        block
        for name in trainable.trained
        if name in nets
        for block in (family.blocks if name == "denoiser" else family.encoder_blocks)(nets[name])
    ]
    return [*own, *(block for follower in models.followers for block in follower.blocks)]


def _cut(config: OptimizerConfig, optimizer: torch.optim.Optimizer, blocks: list[nn.Module]) -> list[Part]:
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    if config.blockwise_fused_optimizers:
        return parts(weights, blocks, size=sum(p.nbytes for p in weights))
    if count := config.fused_optimizer_groups:
        return parts(weights, size=math.ceil(sum(p.nbytes for p in weights) / count))
    return parts(weights, blocks)


def check(config: Config, tried: Trial, trainable: Trainable) -> list[str]:
    """What a user should know. Errors: `UserError` for what cannot work."""
    o = config.optimizer
    if not (o.fused or o.optimizer_state_on_cpu):
        return []
    if o.fused and dist.outside().size > 1:
        raise UserError(
            "fused_backward_pass: several processes exchange gradients in the backward pass, so that none may be freed "
            "there; leave it out, or start one process"
        )
    alone = steps_alone(o, trainable.groups())
    if o.optimizer_state_on_cpu and not alone:
        raise UserError(
            f"optimizer_state_on_cpu: {o.optimizer_type} needs the state of all weights at once; choose an optimizer "
            "that treats each weight by itself, such as AdamW, or leave it out"
        )
    if o.optimizer_state_on_cpu and getattr(tried.optimizer, "is_paged", False):
        raise UserError(
            f"optimizer_state_on_cpu: {o.optimizer_type} pages its state by itself; choose "
            f"{o.optimizer_type.removeprefix('Paged')}, or leave it out"
        )
    size = sum(p.nbytes for group in trainable.groups() for p in group.parameters)
    return [_gradients(config, alone, size)] if o.fused else []


def _wait(config: Config, alone: bool) -> bool:
    """Whether gradients wait on the host in a fused step."""
    o, scaled = config.optimizer, dist.precision(config.train.mixed_precision) == "fp16"
    known_late = scaled or (o.max_grad_norm and o.fused_clipping != "delayed")
    return not alone or bool(known_late and o.fused_clipping != "two_passes")


def _gradients(config: Config, alone: bool, nbytes: int) -> str:
    """What becomes of gradients."""
    o, scaled = config.optimizer, dist.precision(config.train.mixed_precision) == "fp16"
    known = (
        "it is sure that none overflows in fp16"
        if scaled
        else f"their norm is known (max_grad_norm {o.max_grad_norm:g})"
    )
    if not alone:
        known = f"{o.optimizer_type} steps, which needs all of them"
    if _wait(config, alone):
        done = f"gradients wait in the CPU's memory ({nbytes / 2**30:.1f} GiB) until {known}"
    elif scaled or (o.max_grad_norm and o.fused_clipping == "two_passes"):
        done = f"gradients are made twice, as no weight may step until {known}"
    elif o.max_grad_norm:
        done = f"max_grad_norm {o.max_grad_norm:g} goes by the norm of the step before"
    else:
        done = "gradients are freed as they come"
    return f"fused_backward_pass: {done}"
