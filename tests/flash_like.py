"""Stands in for flash-attn, which needs a card."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def flash(calls: list[str], version: str = "") -> ModuleType:
    """Stands in for flash-attn's functions of both versions: their layout and refusals, computed by PyTorch. What no
    sequence reaches has whatever gradient was in memory."""

    class Packed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, k: Tensor, end: Tensor) -> Tensor:
            ctx.end = int(end)
            return k.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            grad = grad.clone()
            grad[ctx.end :] = torch.nan
            return grad, None

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: Any = None) -> Tensor:
        calls.append(f"{version}whole")
        assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> tuple[Tensor, None]:
        calls.append(f"{version}packed")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and q.dtype in (torch.float16, torch.bfloat16)
        k, v = (Packed.apply(t, cu_seqlens_k[-1]) for t in (k, v))
        starts = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
        rows = []
        for q0, q1, k0, k1 in starts:
            assert q1 - q0 <= max_seqlen_q and k1 - k0 <= max_seqlen_k
            one = (t.transpose(0, 1)[None] for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
            rows.append(scaled_dot_product_attention(*one)[0].transpose(0, 1))
        return torch.cat(rows), None

    library = ModuleType("flash_attn")
    library.flash_attn_func, library.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func  # type: ignore[attr-defined]
    return library
