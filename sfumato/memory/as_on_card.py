"""What a step saves on a card, seen without one: two ways in which a CPU computes otherwise, put right."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WIDE = frozenset(
    {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.rsqrt, Tensor.rsqrt, torch.exp}
    | {torch.pow, Tensor.pow, Tensor.__pow__, F.softplus, F.mse_loss, F.smooth_l1_loss, F.cosine_similarity}
)
"""What autocast computes in fp32 on CUDA and XPU cards, and a CPU does not (torch's docs, "Autocast Op Reference")."""


class AsOnCard(TorchFunctionMode):
    """Within, operations on tensors of the CPU make, and save, what they would on a card.

    Attention never stores its scores: flash, cuDNN's and the memory-efficient kernel keep q, k, v, the output and one
    number a query; the CPU's own flash kernel keeps the same, and is taken whatever the CPU would choose.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _flash(*args, **kwargs)
        if func in WIDE and torch.is_autocast_enabled("cpu"):
            args = tuple(map(_wide, args))
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    k, v = (t.to(q.dtype) for t in (k, v))
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out
