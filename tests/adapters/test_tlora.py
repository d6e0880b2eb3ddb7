"""T-LoRA against LyCORIS: which ranks see which noise, and its orthogonal starts."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.tlora import TLoraModule, clear_timestep_mask, compute_timestep_mask, set_timestep_mask
from small import disturb, insert
from torch import nn

from sfumato.adapters import AdapterPlan, from_tensors, parse
from sfumato.adapters.insert import from_state
from sfumato.adapters.lora import LoRA
from sfumato.adapters.tlora import TLoRA
from sfumato.config import NetworkConfig
from sfumato.errors import UserError

close = torch.testing.assert_close
LINEAR = (lambda: nn.Linear(24, 36), (4, 5, 24))
CONV = (lambda: nn.Conv2d(24, 36, 3, padding=1), (4, 24, 5, 4))
TIMESTEPS = (0, 130, 700, 999)


@pytest.fixture(autouse=True)
def no_mask():
    yield
    clear_timestep_mask()


@pytest.mark.parametrize(("make", "shape"), [LINEAR, CONV])
@pytest.mark.parametrize(("least", "power"), [(1, 1.0), (3, 2.0)])
def test_ranks_by_noise(make, shape, least, power):
    """Each sample sees the ranks that LyCORIS lets its timestep see, in training alone."""
    torch.manual_seed(0)
    layer = make()
    options = TLoRA.Options(rank=8, alpha=4.0, min_rank=least, alpha_rank_scale=power)
    adapter = TLoRA(layer, options, torch.Generator())
    nn.init.normal_(adapter.lora_up.weight)
    x = torch.randn(shape)
    whole = adapter.delta(x)
    adapter.context.noise_level = torch.tensor(TIMESTEPS) / 1000
    seen = adapter.delta(x)
    for i, t in enumerate(TIMESTEPS):
        mask = compute_timestep_mask(t, 1000, 8, least, power)[0]
        plain = LoRA(layer, LoRA.Options(rank=8, alpha=4.0), torch.Generator())
        plain.load_tensors(adapter.tensors())
        with torch.no_grad():
            plain.lora_up.weight *= mask.view(-1, *[1] * (plain.lora_up.weight.ndim - 2))
        close(seen[i], plain.delta(x[i : i + 1])[0])
    close(seen[:1], whole[:1])
    assert torch.equal(adapter.eval().delta(x), whole)


@pytest.mark.parametrize("kind", ["principal", "last", "middle"])
def test_orthogonal_starts(kind):
    """The same factors and, with the same steps and mask, the same change as LyCORIS'."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 36).requires_grad_(False)
    other = TLoraModule("x", layer, lora_dim=8, alpha=4.0, sig_type=kind)
    ours = TLoRA(layer, TLoRA.Options(rank=8, alpha=4.0, sig_type=kind), torch.Generator())
    signs = (ours.lora_down.weight * other.q_layer.weight).sum(1).sign()  # of singular vectors any is as good
    close(ours.lora_down.weight, signs[:, None] * other.q_layer.weight, atol=1e-5, rtol=0)
    close(ours.start.up.weight, signs * other.lambda_layer * other.p_layer.weight, atol=1e-5, rtol=1e-5)
    x = torch.randn(1, 5, 24)
    assert not ours.delta(x).any()
    q, p = 0.1 * torch.randn(8, 24), 0.1 * torch.randn(36, 8)
    with torch.no_grad():
        ours.lora_down.weight += signs[:, None] * q
        ours.lora_up.weight += p * signs
        other.q_layer.weight += q
        other.p_layer.weight += p / other.lambda_layer
    close(ours.delta_weight(layer.weight), other.get_diff_weight()[0], atol=1e-5, rtol=1e-5)
    ours.context.noise_level = torch.tensor([0.7])
    set_timestep_mask(compute_timestep_mask(700, 1000, 8))
    close(ours.delta(x) * ours.options.scale, other.bypass_forward_diff(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [{}, {"sig_type": "last"}, {"sig_type": "principal", "use_data_init": False}])
def test_the_file_is_a_plain_lora(net, x, more):
    plan = AdapterPlan(kind=TLoRA, alpha=2.0, conv_rank=3, more=more)
    before = net(x)
    inserted = insert(net, plan)
    assert torch.equal(net(x), before)
    disturb(inserted)
    after, state = (
        net(x),
        {path: {k: t.clone() for k, t in tensors.items()} for path, tensors in inserted.state().items()},
    )
    inserted.remove()
    assert all(from_tensors(tensors)[0] is LoRA for tensors in state.values())
    plain = from_state({"denoiser": net}, state)
    close(net(x), after, atol=1e-5, rtol=1e-5)
    plain.remove()
    from_state({"denoiser": net}, state, plan)
    assert torch.equal(net(x), after)


def test_unknown_start(net):
    with pytest.raises(UserError, match="sig_type=first: expected principal, middle or last"):
        parse(NetworkConfig(network_module="tlora", network_args=("sig_type=first",)))
    with pytest.raises(UserError, match="use_data_init does nothing without sig_type"):
        insert(net, AdapterPlan(kind=TLoRA, more={"use_data_init": False}))
