"""Weights in bf16, trained by any optimizer: it steps on fp32 copies, which are rounded back stochastically.

With plain rounding, a change below 1/256 of a weight is lost whole; stochastic rounding keeps it on average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.tensors.random import key
from sfumato.tensors.rounding import stochastic_round_

_CLOCK = "rounded_steps"
"""Kept in the first parameter group, so that it is saved and resumed with the optimizer's own state."""


def attach(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Hook an optimizer. Its state stays in fp32, over saving and loading as well. Weights of other dtypes are left
    alone."""
    originals: dict[Tensor, Tensor] = {}

    def widen(*_: Any) -> None:
        for p in _low(optimizer):
            grad, p.grad = p.grad, None
            originals[p] = p.data
            p.data = p.data.float()
            p.grad = None if grad is None else grad.float()

    def narrow(*_: Any) -> None:
        steps = optimizer.param_groups[0].setdefault(_CLOCK, 0)
        for i, (p, low) in enumerate(originals.items()):
            grad, p.grad = p.grad, None
            if grad is not None:
                generator = torch.Generator(low.device).manual_seed(key(seed, "round", steps, i))
                stochastic_round_(low, p.data, generator)
            p.data = low
            p.grad = None if grad is None else grad.to(low.dtype)
        optimizer.param_groups[0][_CLOCK] = steps + 1
        originals.clear()

    def restore(*_: Any) -> None:
        for p, low in originals.items():
            p.grad = None
            p.data = low
        originals.clear()

    optimizer.register_step_pre_hook(widen)
    optimizer.register_step_post_hook(narrow)
    # torch casts a loaded state to the weights' dtype: while it loads, they are fp32.
    optimizer.register_load_state_dict_pre_hook(widen)
    optimizer.register_load_state_dict_post_hook(restore)


def _low(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.dtype is torch.bfloat16]
