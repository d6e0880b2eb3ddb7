"""Activation checkpointing from outside: a block's forward is run again in the backward pass instead of being
remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Handle:
    """Undoes `checkpoint_blocks`."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = blocks

    def remove(self) -> None:
        """The blocks are again as they were."""
        for block in self._blocks:
            del block.forward
        self._blocks = []


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> Handle:
    """Wrap each block's `forward`. Gradients are the same; hooks on layers within a block (adapters) run again too.

    Where no gradient is wanted, blocks run as they would without. Errors: `RuntimeError` for a block that is wrapped
    already.
    """
    wrapped: list[nn.Module] = []
    for block in blocks:
        if "forward" in vars(block):
            Handle(wrapped).remove()
            raise RuntimeError(f"{type(block).__name__} has a wrapped forward already")
        block.forward = _again(block.forward)
        wrapped.append(block)
    return Handle(wrapped)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Keeping the random state makes a dropout within the block fall the same way both times.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    return wrapper
