"""Parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from sfumato.optim.groups import Group


def test_one_group():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert Group(name="clip_l", lr=0.1, parameters=parameters, plus=parameters[:1]).for_torch() == [
        {"name": "clip_l", "lr": 0.1, "params": parameters}
    ]


def test_lora_plus_parts_it():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    slow, fast = Group(name="denoiser", lr=0.1, parameters=[a, b, c], plus=[b], loraplus_ratio=16).for_torch()
    assert [id(p) for p in slow["params"]] == [id(a), id(c)]
    assert [id(p) for p in fast["params"]] == [id(b)]
    assert (slow["name"], slow["lr"], fast["name"], fast["lr"]) == ("denoiser", 0.1, "denoiser.plus", 1.6)
