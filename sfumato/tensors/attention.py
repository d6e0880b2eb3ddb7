"""One name for attention: which kernel runs is chosen once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError

Kind = Literal["sdpa", "xformers", "flash", "sageattn"]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Capability = tuple[int, int]
Packed = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""q (b * n, heads, d), k and v (b * m, heads, d), where the sequences of each begin and the last one ends, both
(b + 1,) int32, n and m -> (b * n, heads, d)."""

_INSTALL = {
    "xformers": ("xformers", "pip install xformers"),
    "flash": ("flash-attn", "pip install flash-attn --no-build-isolation"),
    "sageattn": ("sageattention", "pip install sageattention"),
}
"""The library of a kind, and how one gets it."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(d)) v.

    q: (b, heads, n, d); k, v: (b, heads, m, d); mask: broadcastable to (b, heads, n, m), either boolean
    (True: attended to) or added to the scores. Returns (b, heads, n, d).
    """
    return _chosen(q, k, v, mask)


@contextmanager
def plain() -> Iterator[None]:
    """Within, PyTorch's own attention is used, whatever was chosen."""
    global _chosen
    before, _chosen = _chosen, _plain
    try:
        yield
    finally:
        _chosen = before


def choose(kind: Kind, *, training: bool = False, half: bool = True, card: Capability = (0, 0)) -> None:
    """Use this kernel from now on. `half`: whether the computation is in fp16 or bf16. `card`: what NVIDIA calls the
    compute capability of the card that has flash kernels; (0, 0): there is none, or it is not known yet. Errors:
    `UserError` when its library is not installed, has no backward pass that a training needs, or does not compute in
    fp32."""
    global _chosen
    if kind == "sageattn" and training:
        raise UserError("attn_mode sageattn: has no backward pass, so nothing can be trained with it; leave it out")
    if kind in ("flash", "sageattn") and not half:
        raise UserError(f"attn_mode {kind}: computes in fp16 or bf16 alone; set mixed_precision, or leave it out")
    try:
        _chosen = _KINDS[kind](card)
    except ImportError as error:
        library, command = _INSTALL[kind]
        raise UserError(
            f"attn_mode {kind}: {library} is not installed: {command}; or leave it out, and PyTorch's attention is used"
        ) from error


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _sdpa(card: Capability) -> Attend:
    """PyTorch's. Its fast kernels take no mask, but one takes sequences of several lengths (from torch 2.10)."""
    if card < (8, 0):
        return _plain
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _plain

    def packed(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, n: int, m: int) -> Tensor:
        return _alone(varlen_attn(q, k, v, q_starts, k_starts, n, m))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            q, k, v = _cast(q, k, v)
            if _packs(q, mask):
                return _unpadded(packed, q, k, v, mask)
        return _plain(q, k, v, mask)

    return attend


def _flash(card: Capability) -> Attend:
    """flash-attn: its third version where that is installed and the card has it (Hopper), else the second."""
    library = _flash_library(card)

    def packed(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, n: int, m: int) -> Tensor:
        return _alone(library.flash_attn_varlen_func(q, k, v, q_starts, k_starts, n, m))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = _cast(q, k, v)
        if mask is not None and _packs(q, mask):
            return _unpadded(packed, q, k, v, mask)
        if mask is not None or not _is_half(q):
            return _plain(q, k, v, mask)
        out = _alone(library.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
        return out.transpose(1, 2)

    return attend


def _flash_library(card: Capability) -> Any:
    if card[0] == 9:
        try:
            return import_module("flash_attn_interface")
        except ImportError:
            pass
    return import_module("flash_attn")


def _sageattn(card: Capability) -> Attend:
    """Rounds queries and keys to 8 bits (arXiv:2410.02367). Without a backward pass."""
    sageattn = import_module("sageattention").sageattn

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = _cast(q, k, v)
        if mask is not None or not _is_half(q):
            return _plain(q, k, v, mask)
        out: Tensor = sageattn(q, k, v, tensor_layout="HND", is_causal=False)
        return out

    return attend


def _xformers(card: Capability) -> Attend:
    memory_efficient_attention = import_module("xformers.ops").memory_efficient_attention

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


def _unpadded(attend: Packed, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention to the keys alone that `mask` (b, 1, 1, m) shows, as sequences of several lengths, one behind another.

    Nothing is read back from the device: keys that are shown are moved to the front and the others stay behind them,
    where no sequence reaches.
    """
    (b, heads, n, d), m = q.shape, k.shape[2]
    shown = mask.expand(b, 1, 1, m).reshape(-1)  # (b * m,)
    place = torch.where(shown, shown.cumsum(0), shown.sum() + (~shown).cumsum(0)) - 1
    ends = shown.view(b, m).sum(1).cumsum(0)
    k_starts = F.pad(ends, (1, 0)).to(torch.int32)
    q_starts = torch.arange(0, b * n + 1, n, dtype=torch.int32, device=q.device)

    def rows(t: Tensor) -> Tensor:
        flat = t.transpose(1, 2).reshape(-1, heads, d)
        # What no sequence reaches gets no gradient, but whatever was in its memory: it is set to 0 here.
        return torch.empty_like(flat).index_copy(0, place, flat.where(shown[:, None, None], 0))

    out = attend(q.transpose(1, 2).reshape(-1, heads, d), rows(k), rows(v), q_starts, k_starts, n, m)
    return out.view(b, n, heads, d).transpose(1, 2)


def _packs(q: Tensor, mask: Tensor) -> bool:
    """Whether a mask says the same for all queries and heads, and the kernels for sequences take such numbers."""
    return mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:3] == (1, 1) and _is_half(q)


def _is_half(q: Tensor) -> bool:
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256


def _cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autocast does before PyTorch's own attention."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _alone(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions give further results."""
    return out[0] if isinstance(out, tuple) else out


_KINDS: dict[Kind, Callable[[Capability], Attend]] = {
    "sdpa": _sdpa,
    "xformers": _xformers,
    "flash": _flash,
    "sageattn": _sageattn,
}
_chosen: Attend = _plain
