"""Attention against its formula, whichever kernel runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.tensors import attention

Q, K, V = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 8))
V = V[:, :, :7]
SEEN = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.3
SEEN[..., 0] = True


def formula(mask: Tensor | None = None) -> Tensor:
    scores = Q @ K.transpose(-1, -2) / 8**0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ V


@pytest.fixture(autouse=True)
def back_to_the_default() -> Iterator[None]:
    yield
    attention.choose("sdpa")


def xformers() -> ModuleType:
    """Stands in for the library: the same layout and the same refusals, computed by the formula."""

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        assert q.shape == (2, 5, 3, 8) and k.shape == v.shape == (2, 7, 3, 8)
        assert attn_bias is None or (attn_bias.shape == (2, 3, 5, 7) and attn_bias.dtype == q.dtype)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5
        return torch.einsum("bhnm,bmhd->bnhd", (scores if attn_bias is None else scores + attn_bias).softmax(-1), v)

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    return ops


@pytest.mark.parametrize("kind", ["sdpa", "xformers"])
def test_equals_the_formula(kind: attention.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers())
    attention.choose(kind)
    added = torch.zeros(SEEN.shape).masked_fill(~SEEN, -torch.inf)
    torch.testing.assert_close(attention.attention(Q, K, V), formula())
    torch.testing.assert_close(attention.attention(Q, K, V, SEEN), formula(added))
    torch.testing.assert_close(attention.attention(Q, K, V, added), formula(added))


def test_a_missing_library_is_reported_and_the_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match="pip install xformers"):
        attention.choose("xformers")
    torch.testing.assert_close(attention.attention(Q, K, V), formula())
