"""Attention against its formula, whichever kernel runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from flash_like import flash
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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


def sageattention() -> ModuleType:
    library = ModuleType("sageattention")
    library.sageattn = lambda q, k, v, tensor_layout, is_causal: scaled_dot_product_attention(q, k, v)  # type: ignore[attr-defined]
    return library


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All libraries are installed; what is called of flash-attn."""
    made: list[str] = []
    library, torchs = flash(made), ModuleType("torch.nn.attention.varlen")
    torchs.varlen_attn = library.flash_attn_varlen_func  # type: ignore[attr-defined]
    modules = {
        "flash_attn": library,
        "flash_attn_interface": flash(made, "3 "),
        "torch.nn.attention.varlen": torchs,
        "sageattention": sageattention(),
    }
    for name, module in {**modules, "xformers": ModuleType("xformers"), "xformers.ops": xformers()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.parametrize("kind", ["sdpa", "xformers", "flash"])
def test_equals_the_formula(kind: attention.Kind, calls: list[str]) -> None:
    attention.choose(kind, training=True)
    added = torch.zeros(SEEN.shape).masked_fill(~SEEN, -torch.inf)
    torch.testing.assert_close(attention.attention(Q, K, V), formula())
    torch.testing.assert_close(attention.attention(Q, K, V, SEEN), formula(added))
    torch.testing.assert_close(attention.attention(Q, K, V, added), formula(added))
    assert not calls  # they do not compute in fp32


@pytest.mark.parametrize("kind", ["sdpa", "flash", "sageattn"])
@pytest.mark.parametrize(("half", "card"), [(True, (8, 0)), (False, (9, 0))], ids=["bf16", "autocast, Hopper"])
def test_kernels_without_masks(kind: attention.Kind, half: bool, card: tuple[int, int], calls: list[str]) -> None:
    """Padding is left out where flash kernels compute; results and gradients are those with the mask, and what is
    hidden gets none."""
    shown = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0]]).bool()[:, None, None]
    given = [t.to(torch.bfloat16 if half else torch.float32) for t in (Q, K, V)]

    def gradients(mask: Tensor | None) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            out = attention.attention(*leaves, mask)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]

    plain = [gradients(mask) for mask in (None, shown)]
    attention.choose(kind, card=card)
    for wanted, mask in zip(plain, (None, shown), strict=True):
        torch.testing.assert_close(gradients(mask), wanted, atol=0.03, rtol=0.03)
    version = "" if half else "3 "
    made = {"sdpa": ["packed"], "flash": [f"{version}whole", f"{version}packed"], "sageattn": []}
    assert calls == made[kind]


def test_what_cannot_be_chosen(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="sageattn: has no backward pass"):
        attention.choose("sageattn", training=True)
    with pytest.raises(UserError, match="flash: computes in fp16 or bf16 alone; set mixed_precision"):
        attention.choose("flash", half=False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match="flash-attn is not installed: pip install flash-attn"):
        attention.choose("flash")


def test_a_missing_library_is_reported_and_the_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match="pip install xformers"):
        attention.choose("xformers")
    torch.testing.assert_close(attention.attention(Q, K, V), formula())
