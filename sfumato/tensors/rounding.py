"""Rounding to fewer bits."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def stochastic_round_(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Write `high` (fp32) into `low` (bf16, same shape), up or down by chance, so that the mean stays the same
    (arXiv:2010.06192).

    A bf16 number is the upper half of an fp32 number: random bits added below carry over as often as the lower
    half is large. `generator` is on the tensors' device. What is not finite stays as it is. Returns `low`.
    """
    if low.dtype is not torch.bfloat16 or high.dtype is not torch.float32:
        raise TypeError(f"expected bf16 and fp32, not {low.dtype} and {high.dtype}")
    bits = torch.randint(0, 1 << 16, high.shape, generator=generator, device=high.device, dtype=torch.int32)
    bits += high.contiguous().view(torch.int32)
    bits &= -(1 << 16)
    rounded = bits.view(torch.float32)
    return low.copy_(torch.where(torch.isfinite(high), rounded, high))
