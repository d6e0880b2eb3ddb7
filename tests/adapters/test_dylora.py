"""DyLoRA: what is seen, what learns, and that its first ranks are a LoRA of their own."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.dylora import DyLoraModule
from small import insert
from torch import nn

from sfumato.adapters import AdapterPlan
from sfumato.adapters.dylora import DyLoRA
from sfumato.adapters.lora import LoRA
from sfumato.errors import UserError
from sfumato.tensors.random import SampleRandom

close = torch.testing.assert_close
LAYERS = [(lambda: nn.Linear(10, 12), (1, 5, 10)), (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (1, 6, 7, 5))]


def seen_by(adapter: DyLoRA, seed: int) -> int:
    """The last unit that a sample sees."""
    return int(SampleRandom((seed,)).integers(f"dylora {adapter.name}", 0, 6 // 2))


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_against_lycoris(make, shape):
    """The same ranks, gradients and file as LyCORIS', up to the scale: sd-scripts' and ours is sqrt(rank / seen)."""
    torch.manual_seed(0)
    layer = make().requires_grad_(False)
    adapter = DyLoRA(layer, DyLoRA.Options(rank=6, alpha=3.0, unit=2), torch.Generator().manual_seed(1))
    nn.init.normal_(adapter.lora_up.weight)
    other = DyLoraModule("x", layer, lora_dim=6, alpha=3.0, block_size=2)
    down, up = adapter.lora_down.weight, adapter.lora_up.weight
    with torch.no_grad():
        for i in range(3):
            other.down_list[i].copy_(down.flatten(1)[2 * i : 2 * i + 2])
            other.up_list[i].copy_(up.flatten(1)[:, 2 * i : 2 * i + 2])
    theirs = other.custom_state_dict()
    close(theirs["lora_down.weight"].reshape(down.shape), down)
    close(theirs["lora_up.weight"].reshape(up.shape), up)
    x = torch.randn(shape, requires_grad=True)
    units = set()
    for seed in range(12):
        unit = seen_by(adapter, seed)
        units.add(unit)
        adapter.context.rng = SampleRandom((seed,))
        for each in (adapter, other):
            each.zero_grad()
        x.grad = None
        adapter.delta(x).square().sum().backward()
        grad, x.grad = x.grad, None
        weight = other.get_diff_weight(rank=2 * unit)[0] / (3.0 / (unit + 1)) * (6 / (2 * (unit + 1))) ** 0.5
        output = other.op(x, weight, None, **other.kw_dict)
        output.square().sum().backward()
        close(grad, x.grad, atol=1e-4, rtol=1e-4)
        close(
            down.grad.flatten(1),
            torch.cat([p.grad if p.grad is not None else 0 * p for p in other.down_list]),
            atol=1e-3,
            rtol=1e-4,
        )
        close(
            up.grad.flatten(1),
            torch.cat([p.grad if p.grad is not None else 0 * p for p in other.up_list], 1),
            atol=1e-3,
            rtol=1e-4,
        )
        assert down.grad[2 * unit : 2 * unit + 2].all()
    assert units == {0, 1, 2}


def test_all_ranks_act_outside_of_training(net, x):
    inserted = insert(net, AdapterPlan(kind=DyLoRA, rank=4, more={"unit": 2}))
    for p in inserted.parameters():
        nn.init.normal_(p, std=0.3)
    inserted.rng = SampleRandom((1, 2, 3))
    in_training = net(x)
    inserted.rng = SampleRandom((2,))
    close(net(x[1:2]), in_training[1:2], atol=1e-5, rtol=1e-5)  # a sample's ranks do not depend on its batch
    inserted.eval()
    inserted.multiplier = 0.5
    output = net(x)
    assert not torch.allclose(output, in_training)
    inserted.merge()
    inserted.remove()
    close(net(x), output, atol=1e-5, rtol=1e-5)


def test_the_first_ranks_are_a_lora(net):
    adapter = next(iter(insert(net, AdapterPlan(kind=DyLoRA)).by_path().values()))
    assert LoRA.read(adapter.tensors()) == LoRA.Options(rank=4, alpha=1.0)


@pytest.mark.parametrize(("plan", "says"), [({"rank": 4}, "rank 4"), ({"rank": 6, "conv_rank": 5}, "rank 5")])
def test_ranks_that_are_not_of_whole_units(net, plan, says):
    with pytest.raises(UserError, match=f"unit=3: expected a divisor of network_dim, and of conv_dim; found {says}"):
        insert(net, AdapterPlan(kind=DyLoRA, more={"unit": 3}, **plan))
