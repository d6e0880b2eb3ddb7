"""The optimizer's step in parts, as the config asks for it: put together, and checked before a weight is read."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from sfumato.config import Config, OptimizerConfig
from sfumato.errors import UserError
from sfumato.memory.backends import Streams, Threaded
from sfumato.models.base import Models
from sfumato.optim.ema import EMA
from sfumato.optim.fused import FusedStep, Part, parts
from sfumato.optim.host import Copies, Shelf
from sfumato.optim.trial import Trial, steps_alone
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
    return FusedStep(
        optimizer, _cut(o, optimizer, _blocks(models, trainable)), device=device,
        copies=_copies(device), max_norm=o.max_grad_norm,
        clipping=o.fused_clipping, in_backward=o.fused, together=not steps_alone(o, trainable.groups()),
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
    shelf = Shelf(_copies(device)) if config.optimizer_state_on_cpu else None
    return EMA(trainable.weights(), config.ema_decay, shelf)


def _copies(device: torch.device) -> Copies:
    return Threaded() if device.type == "cpu" else Streams(device)


def average(run: Run) -> None:
    """Have the moving average take in weights as they step, while they are on the device."""
    if run.fused and run.ema:
        names = {p: name for name, p in run.trainable.weights().items()}
        run.fused.after.append(partial(_take, run.ema, names))


def _take(ema: EMA, names: dict[nn.Parameter, str], part: Part) -> None:
    ema.take({names[p]: p for p in part})


def _blocks(models: Models, trainable: Trainable) -> list[nn.Module]:
    family, nets = models.family, models.nets()
    return [
        block
        for name in trainable.trained
        for block in (family.blocks if name == "denoiser" else family.encoder_blocks)(nets[name])
    ]


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


def _gradients(config: Config, alone: bool, nbytes: int) -> str:
    """Where gradients wait."""
    o, scaled = config.optimizer, dist.precision(config.train.mixed_precision) == "fp16"
    name, wait = "fused_backward_pass", f"gradients wait in the CPU's memory ({nbytes / 2**30:.1f} GiB)"
    if not alone:
        return f"{name}: {o.optimizer_type} steps all weights at once, so that {wait} until then"
    if scaled or (o.max_grad_norm and o.fused_clipping != "delayed"):
        why = "one of them overflows in fp16" if scaled else f"their norm is known (max_grad_norm {o.max_grad_norm:g})"
        if o.fused_clipping == "two_passes":
            return (
                f"{name}: forward and backward are done twice, as no weight may step before it is known whether {why}"
            )
        return f"{name}: {wait} until it is known whether {why}" if scaled else f"{name}: {wait} until {why}"
    if o.max_grad_norm:
        return f"{name}: max_grad_norm {o.max_grad_norm:g} goes by the norm of the step before"
    return f"{name}: gradients are freed as they come"
