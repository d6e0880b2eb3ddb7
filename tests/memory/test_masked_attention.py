"""Nets that hide padding by a mask give the same where flash kernels leave the padding out."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from flash_like import flash
from tiny_steps import CASES, TinyStep

from sfumato.tensors import attention


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.family) for c in CASES if c.family in ("anima", "chroma", "hunyuan_image", "lumina2")]
)
def test_padding_is_left_out(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TinyStep.of(case, "target=attention")
    with torch.autocast("cpu", torch.bfloat16):
        plain = step.gradients()
        calls: list[str] = []
        varlen = ModuleType("torch.nn.attention.varlen")
        varlen.varlen_attn = flash(calls).flash_attn_varlen_func  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, varlen.__name__, varlen)
        attention.choose("sdpa", card=(8, 0))
        try:
            packed = step.gradients()
        finally:
            attention.choose("sdpa")
    assert "packed" in calls
    for name, wanted in plain.items():
        assert (packed[name] - wanted).norm() <= 0.05 * wanted.norm(), name
