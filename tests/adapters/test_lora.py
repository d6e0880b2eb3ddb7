"""LoRA against LyCORIS and PEFT, given the same weights."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.locon import LoConModule
from peft import LoraConfig, get_peft_model
from small import LAYERS
from torch import nn

from sfumato.adapters.base import LayerOptions
from sfumato.adapters.lora import LoRA
from sfumato.adapters.operation import Operation
from sfumato.formats.dialect import DOWN, MID, UP

close = torch.testing.assert_close


@pytest.fixture(params=[name for name in LAYERS if name != "conv_odd"])  # neither takes over a dilation
def case(request):
    """(layer, adapter with some effect, input)."""
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    layer = make().requires_grad_(False)
    adapter = LoRA(layer, LayerOptions(rank=4, alpha=3.0), torch.Generator().manual_seed(1))
    nn.init.normal_(adapter.lora_up.weight, std=0.2)
    return layer, adapter, torch.randn(shape)


def test_equals_lycoris(case):
    layer, adapter, x = case
    other = LoConModule("x", layer, lora_dim=4, alpha=3.0)
    other.load_state_dict({**adapter.state_dict()}, strict=False)
    close(other.lora_up.weight.reshape(-1), adapter.lora_up.weight.reshape(-1), atol=0, rtol=0)
    mine = adapter(x, layer(x), layer)
    merged = layer.weight + adapter.delta_weight(layer.weight)
    close(other.get_merged_weight()[0].reshape(merged.shape), merged, atol=1e-6, rtol=1e-5)
    other.apply_to()
    close(layer(x), mine, atol=1e-6, rtol=1e-5)


def test_equals_peft(case):
    layer, adapter, x = case
    mine = adapter(x, layer(x), layer)
    peft = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, lora_alpha=3.0, target_modules=["0"]))
    wrapped = peft.base_model.model[0]
    with torch.no_grad():
        wrapped.lora_A["default"].weight.copy_(adapter.lora_down.weight)
        wrapped.lora_B["default"].weight.copy_(adapter.lora_up.weight)
    close(wrapped(x), mine, atol=1e-6, rtol=1e-5)
    mine.sum().backward()
    wrapped(x).sum().backward()
    close(adapter.lora_down.weight.grad, wrapped.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-5)


def test_starts_as_torchs_own_layers_do(case):
    """kaiming_uniform(a=sqrt(5)): evenly within +-1/sqrt(fan in)."""
    _, adapter, _ = case
    down = adapter.lora_down.weight
    bound = down[0].numel() ** -0.5
    assert 0.8 * bound < down.abs().max() <= bound


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (4.0, 1.0), (1.0, 0.25), (8.0, 2.0)])
def test_alpha(alpha, scale):
    options = LayerOptions(rank=4, alpha=alpha)
    assert options.scale == scale
    adapter = LoRA(nn.Linear(3, 3), options, torch.Generator())
    assert adapter.alpha.item() == (alpha or 4.0)
    assert set(adapter.tensors()) == {"alpha", "lora_down.weight", "lora_up.weight"}


def test_a_file_without_alpha_means_the_rank():
    adapter = LoRA(nn.Linear(3, 3), LayerOptions(rank=4, alpha=1.0), torch.Generator())
    tensors = adapter.tensors()
    del tensors["alpha"]
    adapter.load_tensors(tensors)
    assert adapter.options.scale == 1.0
    assert LoRA.read(tensors) == LoRA.Options(rank=4, alpha=4.0)


def test_refuses_what_it_cannot_follow():
    with pytest.raises(TypeError, match="without groups"):
        LoRA(nn.Conv2d(4, 4, 3, groups=2), LayerOptions(), torch.Generator())


@pytest.mark.parametrize("alpha", [3.0, 0.0])
def test_rank_stabilised(case, alpha):
    """arXiv:2312.03732, as LyCORIS and PEFT have it; its file is a plain LoRA, and goes on at the same scale."""
    layer, _, _ = case
    adapter = LoRA(layer, LoRA.Options(rank=4, alpha=alpha, rs_lora=True), torch.Generator().manual_seed(1))
    nn.init.normal_(adapter.lora_up.weight, std=0.2)
    other = LoConModule("x", layer, lora_dim=4, alpha=alpha, rs_lora=True)
    other.load_state_dict(adapter.tensors(), strict=False)
    close(other.alpha, adapter.alpha)
    change = adapter.delta_weight(layer.weight)
    close(other.get_diff_weight()[0], change)
    config = LoraConfig(r=4, lora_alpha=alpha or 4, use_rslora=True, target_modules=["0"])
    wrapped = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    with torch.no_grad():
        wrapped.lora_A["default"].weight.copy_(adapter.lora_down.weight)
        wrapped.lora_B["default"].weight.copy_(adapter.lora_up.weight)
    close(wrapped.get_delta_weight("default"), change, atol=1e-6, rtol=1e-5)
    for options in (LoRA.read(adapter.tensors()), adapter.options):  # a reader that knows nothing of it, and a run
        again = LoRA(layer, options, torch.Generator())
        again.load_tensors(adapter.tensors())
        close(again.delta_weight(layer.weight), change, atol=0, rtol=0)


def test_tucker(case):
    """LyCORIS' LoCon with `use_tucker`: same tensors and effect, and an exact LoRA where names have no `lora_mid`."""
    layer, _, x = case
    adapter = LoRA(layer, LoRA.Options(rank=4, alpha=3.0, use_tucker=True), torch.Generator().manual_seed(1))
    nn.init.normal_(adapter.lora_up.weight, std=0.2)
    other = LoConModule("x", layer, lora_dim=4, alpha=3.0, use_tucker=True)
    tensors = adapter.tensors()
    assert {k: v.shape for k, v in other.custom_state_dict().items()} == {k: v.shape for k, v in tensors.items()}
    assert (MID in tensors) == (layer.weight.shape[2:].numel() > 1)
    other.load_state_dict(tensors, strict=False)
    change = adapter.delta_weight(layer.weight)
    close(other.get_diff_weight()[0], change, atol=1e-6, rtol=1e-5)
    mine = adapter(x, layer(x), layer)
    close(mine, Operation(layer)(x, layer.weight + change) + per_channel(layer, layer.bias), atol=1e-5, rtol=1e-5)
    again = LoRA(layer, LoRA.read(other.custom_state_dict()), torch.Generator())
    again.load_tensors(other.custom_state_dict())
    close(again(x, layer(x), layer), mine, atol=0, rtol=0)
    folded = LoRA.fold_alpha(tensors)
    assert folded.keys() == {DOWN, UP}
    plain = LoRA(layer, LoRA.read(folded), torch.Generator())
    plain.load_tensors(folded)
    close(plain.delta_weight(layer.weight), change, atol=1e-6, rtol=1e-5)
    other.apply_to()
    close(layer(x), mine, atol=1e-5, rtol=1e-5)


def per_channel(layer, bias):
    return 0 if bias is None else bias.view(-1, *[1] * (layer.weight.ndim - 2))
