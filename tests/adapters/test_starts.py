"""Starts from the layer's own weight, against PEFT: the same run, and a file that is a plain LoRA."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small import disturb, insert
from torch import nn

from sfumato.adapters import AdapterPlan, from_tensors, parse
from sfumato.adapters.insert import from_state
from sfumato.adapters.lora import LoRA
from sfumato.adapters.starts import start_factors
from sfumato.config import NetworkConfig
from sfumato.errors import UserError
from sfumato.tensors.random import SampleRandom

close = torch.testing.assert_close
STARTS = pytest.mark.parametrize("how", ["pissa", "olora"])


def plan(how: str, **more: object) -> AdapterPlan:
    return AdapterPlan(kind=LoRA, rank=4, alpha=2.0, conv_rank=3, conv_alpha=1.5, more={"init": how, **more})


@STARTS
@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
def test_as_peft(how, tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(24, 36).requires_grad_(False)
    config = LoraConfig(r=6, lora_alpha=4.5, init_lora_weights=how, target_modules=["0"])
    peft = get_peft_model(nn.Sequential(deepcopy(layer)), config)
    theirs = peft.base_model.model[0]
    ours = LoRA(layer, LoRA.Options(rank=6, alpha=4.5, init=how), torch.Generator())
    close(ours.lora_down.weight, theirs.lora_A.default.weight, atol=2e-5, rtol=0)
    close(ours.start.up.weight, theirs.lora_B.default.weight, atol=1e-5, rtol=1e-5)
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(tmp_path / "first")
    peft.peft_config["default"].init_lora_weights = how
    x = torch.randn(2, 5, 24)
    for output in (theirs(x), ours(x, layer(x), layer)):
        output.square().sum().backward()
    for mine, other in ((ours.lora_up, theirs.lora_B), (ours.lora_down, theirs.lora_A)):
        close(mine.weight.grad, other.default.weight.grad, atol=1e-3, rtol=1e-4)
        with torch.no_grad():
            step = 0.1 * torch.randn(mine.weight.shape)
            mine.weight += step
            other.default.weight += step
    close(ours(x, layer(x), layer), theirs(x), atol=1e-5, rtol=1e-5)
    peft.save_pretrained(tmp_path / "last", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    saved = load_file(tmp_path / "last" / "adapter_model.safetensors")
    a, b = (saved[f"base_model.model.0.lora_{name}.weight"] for name in "AB")
    assert (a.shape, b.shape) == ((12, 24), (36, 12))
    close(b @ a * 0.75, ours.delta_weight(layer.weight), atol=1e-5, rtol=1e-5)


@STARTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_is_a_plain_lora_of_twice_the_rank(net, x, how, dtype):
    """Its effect is the same on the untouched net, and 16 bits take nothing off it but their own precision."""
    before, weights = net(x), {name: t.clone() for name, t in net.state_dict().items()}
    inserted = insert(net, plan(how))
    assert torch.equal(net(x), before)
    disturb(inserted)
    after = net(x)
    inserted.remove()
    assert all(torch.equal(t, weights[name]) for name, t in net.state_dict().items())
    state = {path: {k: t.to(dtype).float() for k, t in tensors.items()} for path, tensors in inserted.state().items()}
    for tensors in state.values():
        kind, options = from_tensors(tensors)
        assert kind is LoRA
        assert (options.rank, options.alpha) in {(8, 4.0), (6, 3.0)}
    from_state({"denoiser": net}, state)
    precision = 1e-5 if dtype is torch.float32 else 0.02
    assert (net(x) - after).abs().max() < precision * (after - before).abs().max()


@STARTS
@pytest.mark.parametrize("from_weights", [True, False])
def test_goes_on_from_its_file_to_the_last_bit(net, x, how, from_weights):
    first = insert(net, plan(how))
    disturb(first)
    output = net(x)
    state = {path: {k: t.clone() for k, t in tensors.items()} for path, tensors in first.state().items()}
    first.remove()
    if from_weights:
        second = from_state({"denoiser": net}, state, plan(how))
    else:
        second = insert(net, plan(how), seed=5)
        second.load(state)
    assert torch.equal(net(x), output)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for path, tensors in second.state().items():
        assert all(torch.equal(t, state[path][leaf]) for leaf, t in tensors.items()), path


@STARTS
def test_merged_and_with_dropout_and_dora(net, x, how):
    inserted = insert(net, plan(how, dropout=0.3, rank_dropout=0.3, dora_wd=True))
    disturb(inserted)
    inserted.rng = SampleRandom((1, 2, 3))
    dropped = net(x)
    inserted.eval()
    whole = net(x)
    assert not torch.allclose(whole, dropped)
    inserted.merge()
    inserted.remove()
    close(net(x), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["pissa", "olora", "principal", "middle", "last"])
@pytest.mark.parametrize("shape", [(36, 24), (3, 24), (24, 3)])
def test_factors(how, shape):
    """A part of the weight; all of it where the rank is enough for that."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    up, down = start_factors(how, weight, 4, 0.5, torch.Generator())
    assert (up.shape, down.shape) == ((shape[0], 4), (4, shape[1]))
    part = up @ down * (0.5 if how == "pissa" else 1.0)
    if min(shape) < 4:
        close(part, weight, atol=1e-3, rtol=0)
    else:
        assert (weight - part).norm() < weight.norm()
    if how == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        close(part, u[:, :4] * s[:4] @ vh[:4], atol=1e-3, rtol=0)


def test_mistakes(net):
    with pytest.raises(UserError, match="init=pisa: expected default, pissa or olora"):
        parse(NetworkConfig(network_args=("init=pisa",)))
    with pytest.raises(UserError, match="no form beside use_tucker"):
        insert(net, plan("pissa", use_tucker=True))
    plain = insert(net, AdapterPlan(kind=LoRA, rank=4, conv_rank=3))
    with pytest.raises(UserError, match="expected a file of rank 8, twice that of the run"):
        insert(net, plan("pissa")).load(plain.state())
    with pytest.raises(UserError, match="scale_weight_norms has no meaning beside"):
        insert(net, plan("pissa")).scale_norms(1.0)


def test_without_values(net):
    """To count and to check, a start makes no decomposition."""
    outline = type(net)().to("meta")
    counted = insert(outline, plan("pissa"))
    shapes = {
        path: {k: t.shape for k, t in tensors.items()} for path, tensors in insert(net, plan("pissa")).state().items()
    }
    assert {path: {k: t.shape for k, t in tensors.items()} for path, tensors in counted.state().items()} == shapes
