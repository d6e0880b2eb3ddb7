"""One name for attention: which kernel runs is chosen once, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError

Kind = Literal["sdpa", "xformers"]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(d)) v.

    q: (b, heads, n, d); k, v: (b, heads, m, d); mask: broadcastable to (b, heads, n, m), either boolean
    (True: attended to) or added to the scores. Returns (b, heads, n, d).
    """
    return _chosen(q, k, v, mask)


def choose(kind: Kind) -> None:
    """Use this kernel from now on; raises `UserError` when its library is not installed."""
    global _chosen
    _chosen = _sdpa if kind == "sdpa" else _xformers()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _xformers() -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    try:
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError(
            "--xformers: the library is not installed; run `pip install xformers`, or leave the flag out"
        ) from error

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # xformers wants (b, n, heads, d), a mask that is added to the scores, and one dtype for all.
        if mask is not None:
            added = (
                torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
                if mask.dtype == torch.bool
                else mask.to(q.dtype)
            )
            mask = added.expand(*q.shape[:3], k.shape[2])
        out: Tensor = memory_efficient_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=mask
        )
        return out.transpose(1, 2)

    return attend


_chosen: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = _sdpa
