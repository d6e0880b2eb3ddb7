"""What an error costs: the losses unreduced, and the one place where they are reduced."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sfumato.tensors.shapes import per_sample

Kind = Literal["l1", "l2", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]


def loss(kind: Kind, prediction: Tensor, target: Tensor, *, c: Tensor | None = None) -> Tensor:
    """The loss of each element, in fp32 and shaped as `prediction` (b, ...).

    The Huber losses are the smooth ("pseudo") ones of arXiv:2403.16728, with a threshold `c` (b,) per sample:
    below it they are squared, above it absolute.
    """
    d = prediction.float() - target.float()
    if kind == "l2":
        return d.square()
    if kind == "l1":
        return d.abs()
    if c is None:
        raise ValueError(f"{kind} needs a threshold c")
    c = per_sample(c, d).to(d.dtype)
    # 2 (sqrt(d^2 + c^2) - c), written so that it loses no digits where |d| is far below c.
    smooth = 2 * d.square() / (torch.sqrt(d.square() + c.square()) + c)
    return c * smooth if kind == "huber" else smooth


def huber_threshold(
    schedule: HuberSchedule, c: float, scale: float, t: Tensor, noise_to_signal: Tensor, steps: int
) -> Tensor:
    """The (b,) thresholds of the Huber losses, one for each sample's own timestep.

    `t` (b,) is in units of the process's `steps`; `noise_to_signal` (b,) may be infinite.
    """
    if schedule == "constant":
        return torch.full_like(noise_to_signal, c * scale)
    if schedule == "exponential":
        return torch.exp(math.log(c) * t.to(noise_to_signal) / steps) * scale
    return ((1 - c) / (1 + noise_to_signal).square() + c) * scale


def sample_losses(error: Tensor, mask: Tensor | None, timestep_weight: Tensor, sample_weight: Tensor) -> Tensor:
    """An unreduced `error` (b, c, h, w) -> the loss of each sample, (b,); their mean is what is minimised.

    Times `mask` (b, 1, h, w), mean over each sample, times the weights (b,) of its timestep and of the sample itself.
    The mean is over all elements, masked ones too, so that a small mask is a small loss.
    """
    if mask is not None:
        error = error * mask
    return error.flatten(1).mean(1) * timestep_weight * sample_weight
