"""GGPO: how strong the noise is, that it is each sample's own, and that it is in training alone."""

from __future__ import annotations

import pytest
import torch
from small import LAYERS, disturb, insert
from torch import nn

from sfumato.adapters import AdapterPlan
from sfumato.adapters.lora import LoRA
from sfumato.errors import UserError
from sfumato.tensors.random import SampleRandom

close = torch.testing.assert_close
PLAN = AdapterPlan(kind=LoRA, alpha=2.0, conv_rank=3, more={"ggpo_sigma": 0.03, "ggpo_beta": 0.01})


@pytest.mark.parametrize("name", ["linear", "vector", "conv_stride", "conv_odd"])
def test_the_deviation_follows_from_the_norms(name):
    """sd-scripts' formula, by matrices that are built: of the weight's rows, and of W's gradient through the factors."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    adapter = LoRA(layer, LoRA.Options(rank=4, alpha=2.0, ggpo_sigma=0.3, ggpo_beta=0.1), torch.Generator())
    nn.init.normal_(adapter.lora_up.weight)
    adapter.context.rng = SampleRandom((1, 2))
    assert not adapter.ggpo(adapter, torch.randn(shape)).any(), "none before the first step"
    x = torch.randn(shape)
    adapter.delta(x).square().mean().backward()
    adapter.after_step()
    up, down = adapter.lora_up.weight, adapter.lora_down.weight
    norm = (
        layer.weight.flatten(1).square().sum(1) + adapter.delta_weight(layer.weight).flatten(1).square().sum(1)
    ).sqrt()
    gradient = 0.5 * (up.flatten(1) @ down.grad.flatten(1) + up.grad.flatten(1) @ down.flatten(1))
    expected = (0.3 * norm + 0.1 * gradient.square().sum(1)) / len(norm) ** 0.5
    close(adapter.ggpo.deviation[:, 0], expected, rtol=1e-4, atol=1e-6)
    before = adapter.ggpo.deviation.clone()
    down.grad[0] = torch.inf
    adapter.after_step()
    assert torch.equal(adapter.ggpo.deviation, before), "a step of infinite gradients is none"


def test_noise_of_that_deviation():
    """Of y's rows it is the norm of x times the weight's deviation."""
    layer = nn.Linear(16, 3).requires_grad_(False)
    adapter = LoRA(layer, LoRA.Options(ggpo_sigma=1.0, ggpo_beta=1.0), torch.Generator())
    with torch.no_grad():
        adapter.ggpo.deviation.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
    adapter.context.rng = SampleRandom(range(4000))
    x = torch.randn(1, 16).expand(4000, 16)
    noise = adapter(x, layer(x), layer) - layer(x)
    close(noise.std(0) / x[0].norm(), torch.tensor([0.0, 1.0, 2.0]), atol=0.05, rtol=0.03)


def test_each_sample_has_its_own_in_training(net, x):
    inserted = insert(net, PLAN)
    disturb(inserted)
    inserted.eval()
    without = net(x)
    inserted.train()
    with pytest.raises(RuntimeError, match="rng"):
        net(x)
    inserted.rng = SampleRandom((1, 2, 3))
    close(net(x), without, rtol=1e-5, atol=1e-6)
    net(x).square().sum().backward()
    inserted.after_step()
    noisy = net(x)
    assert not torch.allclose(noisy, without)
    assert torch.equal(net(x), noisy)
    inserted.rng = SampleRandom((2,))
    close(net(x[1:2]), noisy[1:2], atol=1e-5, rtol=1e-5)
    inserted.eval()
    assert torch.equal(net(x), without)


def test_files_know_nothing_of_it(net):
    inserted = insert(net, PLAN)
    disturb(inserted)
    plain = insert(net, AdapterPlan(kind=LoRA, alpha=2.0, conv_rank=3))
    assert all(tensors.keys() == plain.state()[path].keys() for path, tensors in inserted.state().items())
    inserted.load(plain.state())
    plain.load(inserted.state())


@pytest.mark.parametrize(
    ("more", "says"),
    [({"ggpo_sigma": 0.1}, "one does nothing without the other"), ({"init": "pissa", **PLAN.more}, "no form beside")],
)
def test_mistakes(net, more, says):
    with pytest.raises(UserError, match=says):
        insert(net, AdapterPlan(kind=LoRA, more=more))
