"""What every kind of adapter must do; a new kind is found by its file and needs no line here."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from small import Net, disturb, insert
from torch import nn

from sfumato.adapters import from_tensors
from sfumato.adapters.insert import AdapterNetwork, from_state
from sfumato.errors import UserError
from sfumato.memory.backends import Threaded
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.memory.quantise import store
from sfumato.optim.fused import FusedStep
from sfumato.tensors.random import SampleRandom
from sfumato.tensors.stored import Int8

close = torch.testing.assert_close
LIMITED_OTHERWISE = {"OFT", "BOFT"}
"""Kinds whose own tensors are limited, not the change: as in LyCORIS."""


def test_starts_with_no_effect(net, plan, x):
    before = net(x)
    inserted = insert(net, plan)
    assert len(inserted.by_path()) == 5
    assert torch.equal(net(x), before)


def test_start_values_follow_from_the_seed_and_the_layer(net, plan):
    def values(seed: int) -> list[torch.Tensor]:
        inserted = insert(net, plan, seed=seed)
        inserted.remove()
        return list(inserted.parameters())

    state = torch.get_rng_state()
    first, again, other = values(3), values(3), values(4)
    assert torch.equal(torch.get_rng_state(), state), "the global random state was touched"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if any(p.any() for p in first):  # a kind may start with zeros alone
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    alone = insert(net, replace(plan, conv_rank=None), seed=3)
    whole = insert(net, plan, seed=3)
    for path, adapter in alone.by_path().items():
        for a, b in zip(adapter.parameters(), whole.by_path()[path].parameters(), strict=True):
            assert torch.equal(a, b), path


@pytest.mark.parametrize("multiplier", [1.0, -0.7])
def test_merged_weights_do_as_the_adapter_does(net, plan, x, multiplier):
    before = net(x)
    inserted = insert(net, plan)
    disturb(inserted)
    inserted.multiplier = multiplier
    adapted = net(x)
    assert (adapted - before).abs().max() > 1e-3
    inserted.merge()
    inserted.remove()
    close(net(x), adapted, atol=1e-5, rtol=1e-5)


class Unseen(torch.optim.SGD):
    """Changes weights behind autograd's back, as the optimizers of many libraries do."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def test_its_weights_may_step_in_the_backward_pass(net, plan, x):
    """What is left of the pass does not need them."""

    def trained(fused: bool) -> list[torch.Tensor]:
        own = deepcopy(net)
        inserted = insert(own, plan)
        disturb(inserted)
        weights = [p for p in inserted.parameters() if p.requires_grad]
        optimizer = Unseen(weights, lr=0.3)
        step = FusedStep(optimizer, [[p] for p in weights], device=x.device, copies=Threaded(), in_backward=fused)

        def backward() -> torch.Tensor:
            loss = own(x).square().sum()
            loss.backward()
            return loss.detach()

        for _ in range(2):
            step.step(backward, torch.amp.GradScaler("cpu", enabled=False), lambda: None)
        return [p.detach() for p in weights]

    close(trained(True), trained(False))


def test_change_keeps_the_weights_shape(net, plan):
    inserted = insert(net, plan)
    for (_, path), adapter in inserted.by_path().items():
        weight = net.get_submodule(path).weight
        assert adapter.delta_weight(weight).shape == weight.shape


def test_every_leaf_learns(net, plan, x):
    inserted = insert(net, plan)
    optimizer = torch.optim.SGD(inserted.parameters(), lr=0.1)
    for _ in range(2):  # in the first step, factors whose partner is still zero learn nothing
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in inserted.parameters() if p.requires_grad)
    assert all(p.grad is None for p in net.parameters())


def test_on_weights_in_fewer_bits(net, plan, x):
    """As on the weights that these stand for."""
    stored = deepcopy(net)
    for path, layer in stored.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            kept = store(layer, Int8())
            kept.norms = None  # as of a file in fewer bits: no other weight is known
            net.get_submodule(path).weight.copy_(kept.weight)
    results = []
    for each in (net, stored):
        inserted = insert(each, plan)
        disturb(inserted)
        y = each(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in inserted.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        close(a, b, atol=1e-5, rtol=1e-5)


def test_state_round_trip(net, plan, x):
    first = insert(net, plan)
    disturb(first)
    output, state = (
        net(x),
        {path: {k: t.clone() for k, t in tensors.items()} for path, tensors in first.state().items()},
    )
    first.remove()
    second = insert(net, plan, seed=5)
    second.load(state)
    assert torch.equal(net(x), output)
    second.remove()
    for path, tensors in state.items():
        kind, options = from_tensors(tensors, prefer=plan.kind)
        assert kind is plan.kind
        own = first.by_path()[path].options
        if kind.has_rank and kind.has_alpha:
            assert (options.rank, options.alpha) == (own.rank, own.alpha)
    third = from_state({"denoiser": net}, state)
    assert torch.equal(net(x), output)
    assert list(third.by_path()) == list(first.by_path())


def test_remove_restores(net, plan, x):
    before, keys = net(x), list(net.state_dict())
    inserted = insert(net, plan)
    disturb(inserted)
    assert not torch.equal(net(x), before)
    assert list(net.state_dict()) == keys
    inserted.remove()
    assert torch.equal(net(x), before)
    assert not any(layer._forward_hooks for layer in net.modules())


def test_a_multiplier_for_each_sample(net, plan, x):
    inserted = insert(net, plan)
    disturb(inserted)
    alone = []
    for strength, sample in zip((0.0, 0.5, 2.0), x, strict=True):
        inserted.multiplier = strength
        alone.append(net(sample[None]))
    inserted.multiplier = torch.tensor([0.0, 0.5, 2.0])
    close(net(x), torch.cat(alone), atol=1e-6, rtol=1e-5)
    inserted.multiplier = torch.tensor([1.0, 1.0])
    with pytest.raises(RuntimeError, match="3 rows do not share out"):
        net(x)


def test_samples_of_several_rows_share_a_multiplier(net, plan):
    inserted = insert(net, plan)
    disturb(inserted)
    to_q = net.block.to_q
    rows = torch.randn(6, 5, 10)  # two samples of three chunks
    inserted.multiplier = torch.tensor([0.5, 2.0])
    both = to_q(rows)
    for strength, part in ((0.5, slice(0, 3)), (2.0, slice(3, 6))):
        inserted.multiplier = strength
        close(both[part], to_q(rows[part]))


@pytest.mark.parametrize("name", ["dropout", "rank_dropout", "module_dropout"])
def test_dropouts(net, plan, x, name):
    if name not in plan.kind.supports:
        pytest.skip(f"{plan.kind.__name__} has no {name}")
    whole = insert(net, plan)
    disturb(whole)
    output = net(x)
    whole.remove()
    inserted = insert(net, replace(plan, more={**plan.more, name: 0.5}))
    disturb(inserted)
    with pytest.raises(RuntimeError, match="rng"):
        net(x)
    inserted.rng = SampleRandom((11, 12, 13))
    dropped = net(x)
    assert not torch.allclose(dropped, output)
    assert torch.equal(net(x), dropped), "the same random numbers drop the same"
    inserted.rng = SampleRandom((12,))
    close(net(x[1:2]), dropped[1:2], atol=1e-6, rtol=1e-5)  # a sample's dropout does not depend on its batch
    inserted.eval()
    assert torch.equal(net(x), output)


@pytest.mark.parametrize("name", ["dropout", "rank_dropout"])
def test_dropouts_keep_the_mean(plan, name):
    if name not in plan.kind.supports:
        pytest.skip(f"{plan.kind.__name__} has no {name}")
    layer = nn.Linear(4, 6).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    adapter = plan.kind(layer, plan.kind.Options(rank=4, **{name: 0.25}), g)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 + 0.1 * torch.randn(p.shape, generator=g))
    x = torch.ones(4000, 2, 4)
    whole = adapter.eval()(x, layer(x), layer)
    adapter.train().context.rng = SampleRandom(range(4000))
    close(adapter(x, layer(x), layer).mean((0, 1)), whole.mean((0, 1)), atol=0.03, rtol=0.03)


def test_checkpointed_gradients_are_equal(net, plan, x):
    more = dict.fromkeys(plan.kind.supports, 0.3)
    inserted = insert(net, replace(plan, more={**plan.more, **more}))
    disturb(inserted)
    inserted.rng = SampleRandom((1, 2, 3))

    def gradients() -> list[torch.Tensor]:
        inserted.zero_grad()
        net(x).square().sum().backward()
        return [p.grad.clone() for p in inserted.parameters() if p.requires_grad]

    plain = gradients()
    handle = checkpoint_blocks([net.block])
    again = gradients()
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_compiled_in_one_graph(net, plan, x):
    """`fullgraph` raises where a kind leaves the graph."""
    inserted = insert(net, plan)
    disturb(inserted)

    def gradients(forward) -> list[torch.Tensor]:
        inserted.zero_grad()
        forward(x).square().sum().backward()
        return [p.grad.clone() for p in inserted.parameters() if p.grad is not None]

    def two_layers(x: torch.Tensor) -> torch.Tensor:
        return net.block.to_out(net.block.conv1(x).flatten(2))

    torch._dynamo.reset()
    compiled = torch.compile(two_layers, backend="aot_eager", fullgraph=True)
    for mine, wanted in zip(gradients(compiled), gradients(two_layers), strict=True):
        close(mine, wanted)


@pytest.mark.parametrize("autocast", [True, False])
def test_fp32_adapters_on_a_bf16_net(net, plan, x, autocast):
    inserted = insert(net, plan)
    disturb(inserted)
    exact = net(x)
    net.bfloat16()
    assert all(p.dtype is torch.float32 for p in inserted.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = net(x if autocast else x.bfloat16())
    assert output.dtype is torch.bfloat16
    close(output.float(), exact, atol=0.03, rtol=0.05)
    output.float().sum().backward()
    gradients = [p.grad for p in inserted.parameters() if p.requires_grad]
    assert all(grad is not None and grad.dtype is torch.float32 and grad.isfinite().all() for grad in gradients)


def test_bf16_adapters_on_a_bf16_net(net, plan, x):
    inserted: AdapterNetwork = insert(net, plan)
    disturb(inserted)
    exact = net(x)
    net.bfloat16()
    inserted.bfloat16()
    close(net(x.bfloat16()).float(), exact, atol=0.05, rtol=0.05)


def test_on_the_meta_device(net, plan):
    with torch.device("meta"):
        large = type(net)()
    shapes = {path: {k: t.shape for k, t in tensors.items()} for path, tensors in insert(large, plan).state().items()}
    assert shapes == {
        path: {k: t.shape for k, t in tensors.items()} for path, tensors in insert(net, plan).state().items()
    }


def test_norms_are_scaled_down_to_the_limit(net, plan):
    inserted = insert(net, plan)
    disturb(inserted)
    weights = {path: net.get_submodule(path[1]).weight for path in inserted.by_path()}
    before = {path: a.delta_weight(weights[path]) for path, a in inserted.by_path().items()}
    norms = {path: c.norm().item() for path, c in before.items()}
    if plan.kind.__name__ in LIMITED_OTHERWISE:
        norms = {path: a.oft_blocks.norm().item() for path, a in inserted.by_path().items()}
    limit = sorted(norms.values())[2]
    try:
        found = inserted.scale_norms(limit * 1.0001)
    except UserError as error:
        assert "scale_weight_norms has no meaning for" in str(error)
        assert all(torch.equal(a.delta_weight(weights[path]), before[path]) for path, a in inserted.by_path().items())
        return
    assert found.scaled == 2
    assert found.largest == pytest.approx(limit, rel=1e-3)
    for path, adapter in inserted.by_path().items():
        if plan.kind.__name__ in LIMITED_OTHERWISE and norms[path] > limit:
            assert adapter.oft_blocks.norm().item() == pytest.approx(limit, rel=1e-3)
            continue
        close(adapter.delta_weight(weights[path]), before[path] * min(1, limit / norms[path]), rtol=1e-3, atol=1e-6)


def test_layers_without_values_are_enough_to_count_and_check(plan):
    """`plan` builds adapters on the meta device: shapes, names and files are as on a real net, and no random number is made."""
    real, outline = Net(), Net().to("meta")
    inserted, counted = insert(real, plan), insert(outline, plan)
    shapes = {path: {name: t.shape for name, t in tensors.items()} for path, tensors in inserted.state().items()}
    assert {path: {name: t.shape for name, t in tensors.items()} for path, tensors in counted.state().items()} == shapes
    assert all(p.is_meta for p in counted.parameters())
    counted.load(inserted.state())
    counted.remove()
    from_state({"denoiser": outline}, inserted.state())
