"""Activation checkpointing from outside: a block's forward is run again in the backward pass instead of being
remembered."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from sfumato.memory.offload import Offload

Keep = Literal["attention", "costly"]
"""What of a block is remembered all the same."""

_ATTENTION = re.compile(r"attention|attn|flash")
_PRODUCT = re.compile(r"::(_int_|_scaled_)?b?(?P<added>add)?b?mm$")
_CONVOLUTION = re.compile(r"::_?convolution$")
_COSTLY = 2
"""A product is kept whose sums have at least so many times more terms than a row of the result has numbers: the second
of the layers of an MLP, not those that widen; and most convolutions."""


class Handle:
    """Undoes `checkpoint_blocks`."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Any]] = []

    def wrap(self, block: nn.Module, wrapper: Callable[..., Any]) -> None:
        """Put a wrapper in the place of a block's forward."""
        self._before.append((block, vars(block).get("forward")))
        block.forward = wrapper

    def remove(self) -> None:
        """The blocks are again as they were."""
        for block, forward in self._before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward
        self._before = []


def checkpoint_blocks(
    blocks: Sequence[nn.Module], *, every: int = 1, keep: Keep | None = None, offload: Offload | None = None
) -> Handle:
    """Wrap the `forward` of each block, or of every k-th. Gradients are the same; hooks on layers within a block
    (adapters) run again too.

    `keep`: results that cost much to compute for the memory they take, and are remembered all the same: those of
    attention, or of matrix products and convolutions with long sums as well. `offload`: takes what blocks are given to
    the host. Where no gradient is wanted, blocks run as they would without. Errors: `RuntimeError` for a block that is
    checkpointed already.
    """
    handle = Handle()
    for block in blocks[every - 1 :: every]:
        if hasattr(block.forward, "_checkpointed"):
            handle.remove()
            raise RuntimeError(f"{type(block).__name__} is checkpointed already")
        handle.wrap(block, _again(block.forward, keep, offload))
    return handle


def _again(forward: Callable[..., Any], keep: Keep | None, offload: Offload | None) -> Callable[..., Any]:
    kept = partial(create_selective_checkpoint_contexts, _policy(keep)) if keep else noop_context_fn

    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with offload.block() if offload else nullcontext():
            # Keeping the random state makes a dropout within the block fall the same way both times.
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=True, context_fn=kept, **kwargs
            )  # fmt: skip

    wrapper._checkpointed = True  # type: ignore[attr-defined]
    return wrapper


def _policy(keep: Keep) -> Callable[..., CheckpointPolicy]:
    """Which operators' results are kept."""

    def policy(_: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operator.name()  # with the overload, if it has a name: such as write into what they are given
        kept = _ATTENTION.search(name) or (keep == "costly" and _is_costly(name, args))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _is_costly(name: str, args: Sequence[Any]) -> bool:
    """Whether this is a product with much computation for each number of the result."""
    if _CONVOLUTION.search(name):
        weight: Tensor = args[1]
        return weight.shape[1:].numel() >= _COSTLY * weight.shape[0]
    if product := _PRODUCT.search(name):
        factor: Tensor = args[2 if product["added"] else 1]  # (..., terms, columns)
        return factor.shape[-2] >= _COSTLY * factor.shape[-1]
    return False
