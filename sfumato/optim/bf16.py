"""Weights in bf16, trained by any optimizer: it steps on fp32 copies, which are rounded back to bf16.

With plain rounding, a change below 1/256 of a weight is lost whole. Stochastic rounding keeps it on average; Kahan's
summation keeps what rounding took away, in bf16 as well, and adds it at the next step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.tensors.random import key
from sfumato.tensors.rounding import stochastic_round_

_CLOCK = "rounded_steps"
"""Kept in the parameter groups, so that it is saved and resumed with the optimizer's own state."""
_LOST = "rounding_error"
"""Kept in the optimizer's state of a weight: what rounding took away."""


def attach(optimizer: torch.optim.Optimizer, seed: int, *, kahan: bool = False) -> None:
    """Hook an optimizer. Its state stays in fp32, over saving and loading as well. Weights of other dtypes are left
    alone. The optimizer may be shown a part of its weights: each rounds by its place among all."""
    originals: dict[Tensor, Tensor] = {}
    place = {p: i for i, p in enumerate(_low(optimizer))}

    def widen(*_: Any) -> None:
        for p in _low(optimizer):
            grad, p.grad = p.grad, None
            originals[p] = p.data
            p.data = p.data.float()
            if kahan and grad is not None and (lost := optimizer.state.get(p, {}).get(_LOST)) is not None:
                p.data += lost
            p.grad = None if grad is None else grad.float()

    def narrow(*_: Any) -> None:
        steps = max((group.get(_CLOCK, 0) for group in optimizer.param_groups), default=0)
        for p, low in originals.items():
            grad, p.grad = p.grad, None
            if grad is not None and kahan:
                low.copy_(p.data)
                optimizer.state[p][_LOST] = (p.data - low).to(low.dtype)
            elif grad is not None:
                generator = torch.Generator(low.device).manual_seed(key(seed, "round", steps, place[p]))
                stochastic_round_(low, p.data, generator)
            p.data = low
            p.grad = None if grad is None else grad.to(low.dtype)
        for group in optimizer.param_groups:
            group[_CLOCK] = steps + 1
        originals.clear()

    def empty(*_: Any) -> None:
        for p in _low(optimizer):
            originals[p] = p.data
            p.data = torch.empty(0, device=p.device)

    def restore(*_: Any) -> None:
        for p, low in originals.items():
            p.data = low
            state = optimizer.state.get(p, {})
            if _LOST in state:
                state[_LOST] = state[_LOST].to(low.dtype)
        originals.clear()
        # An older state has it in the first group alone.
        if steps := max((group.get(_CLOCK, 0) for group in optimizer.param_groups), default=0):
            for group in optimizer.param_groups:
                group[_CLOCK] = steps

    optimizer.register_step_pre_hook(widen)
    optimizer.register_step_post_hook(narrow)
    # torch casts a loaded state to the weights' dtype: while it loads, they are fp32.
    optimizer.register_load_state_dict_pre_hook(empty)
    optimizer.register_load_state_dict_post_hook(restore)


def _low(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.dtype is torch.bfloat16]
