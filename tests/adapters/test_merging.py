"""What adapters make of single weights: products are added some rows at a time, and are what `delta_weight` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.adapters import merging
from sfumato.adapters.lora import LoRA, LoRAOptions
from sfumato.formats.dialect import AdapterTensors


def lora(layer: nn.Module, seed: int, **options: Any) -> AdapterTensors:
    """A file's tensors of a LoRA on a layer, none of them zero."""
    random = torch.Generator().manual_seed(seed)
    adapter = LoRA(layer, LoRAOptions(rank=4, alpha=2.0, **options), random)
    return {
        leaf: t if leaf == "alpha" else torch.randn(t.shape, generator=random) for leaf, t in adapter.tensors().items()
    }


@pytest.mark.parametrize("form", ["linear", "conv", "tucker", "dora"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_in_the_cache_are_what_the_whole_would_be(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "BLOCK", 200)  # several blocks, the last one smaller
    layer: nn.Module = nn.Linear(24, 37) if form in ("linear", "dora") else nn.Conv2d(8, 37, 3)
    options = {"tucker": {"use_tucker": True}, "dora": {"dora_wd": True}}.get(form, {})
    states = [lora(layer, 0), lora(layer, 1, **options)]
    each = [merging.changes({"net": nn.Sequential(layer)}, {("net", "0"): s}, lambda _, r=r: r) for s, r in
            zip(states, (0.8, -0.5), strict=True)]  # fmt: skip
    change = merging.in_order(*each)["net"]["0.weight"]
    assert (change.factors() is None) == (form == "dora")
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach().to(dtype)
    expected = weight.float()
    for state, ratio in zip(states, (0.8, -0.5), strict=True):
        expected = expected + ratio * merging.with_values("net.0", layer, state).delta_weight(expected)
    threads = torch.get_num_threads()
    changed = change(weight.clone(), dtype)
    assert torch.get_num_threads() == threads
    assert changed.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(changed, expected.detach().to(dtype), atol=4e-6, rtol=max(step, 2e-6))


def test_a_weight_that_stands_otherwise_in_memory_is_changed_all_the_same() -> None:
    layer = nn.Linear(6, 5)
    change = merging.changes({"net": nn.Sequential(layer)}, {("net", "0"): lora(layer, 0)}, lambda _: 1.0)
    weight = layer.weight.detach()
    standing, turned = (change["net"]["0.weight"](t, torch.float32) for t in (weight.clone(), weight.T.clone().T))
    torch.testing.assert_close(turned, standing, atol=1e-6, rtol=1e-6)
    assert (standing - weight).abs().max() > 0.1
