"""LoRA-FA."""

from __future__ import annotations

import pytest
import torch
from small import disturb, insert
from torch import nn

from sfumato.adapters import AdapterPlan, from_tensors
from sfumato.adapters.lora import LoRA
from sfumato.adapters.lora_fa import LoRAFA


def test_starts_as_sd_scripts_does():
    down = LoRAFA(nn.Linear(300, 30), LoRAFA.Options(rank=20), torch.Generator().manual_seed(0)).lora_down.weight
    assert down.std().item() == pytest.approx((2 / 320) ** 0.5, rel=0.03)
    conv = LoRAFA(nn.Conv2d(100, 30, 3), LoRAFA.Options(rank=20), torch.Generator().manual_seed(0)).lora_down.weight
    assert conv.std().item() == pytest.approx((2 / 120) ** 0.5, rel=0.03)


def test_only_up_learns_and_no_input_is_kept_for_down(net, x):
    inserted = insert(net, AdapterPlan(kind=LoRAFA, conv_rank=3))
    disturb(inserted)
    kept: set[int] = set()
    adapter, layer = inserted.by_path()["denoiser", "block.to_q"], net.block.to_q
    given = torch.randn(2, 5, 10)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        adapter(given, layer(given), layer)
    assert given.data_ptr() not in kept
    net(x).sum().backward()
    assert {name.rsplit("lora_")[-1]: p.grad is not None for name, p in inserted.named_parameters()} == {
        "down.weight": False,
        "up.weight": True,
    }
    assert all(from_tensors(tensors)[0] is LoRA for tensors in inserted.state().values())


def test_max_norm_leaves_down_alone(net):
    inserted = insert(net, AdapterPlan(kind=LoRAFA, conv_rank=3))
    disturb(inserted)
    before = [a.lora_down.weight.clone() for a in inserted.by_path().values()]
    inserted.scale_norms(1e-3)
    assert all(torch.equal(a.lora_down.weight, b) for a, b in zip(inserted.by_path().values(), before, strict=True))
