"""DoRA against LyCORIS and PEFT, given the same weights, and its tensors in files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lycoris.modules.locon import LoConModule
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from small import LAYERS
from torch import nn

from sfumato.adapters import files, from_tensors
from sfumato.adapters.dora import DoRA
from sfumato.adapters.lora import LoRA
from sfumato.errors import UserError
from sfumato.formats.dialect import DORA, usual

close = torch.testing.assert_close
AXES = pytest.mark.parametrize("on_out", [True, False])
DIALECTS = usual({"net": "lora_unet_"}, {"net": "diffusion_model."}, {"net": "base_model.model."}, {})


@pytest.fixture(params=[name for name in LAYERS if name != "conv_odd"])  # neither takes over a dilation
def case(request):
    """(layer, input)."""
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().requires_grad_(False), torch.randn(shape)


def adapter_on(layer: nn.Module, **options: bool) -> DoRA:
    """With some effect."""
    adapter = DoRA(layer, DoRA.Options(rank=4, alpha=3.0, **options), torch.Generator().manual_seed(1))
    nn.init.normal_(adapter.lora_up.weight, std=0.2)
    with torch.no_grad():
        adapter.dora_scale *= torch.rand(adapter.dora_scale.shape) + 0.5
    return adapter


@AXES
def test_equals_lycoris(case, on_out):
    layer, x = case
    adapter = adapter_on(layer, wd_on_out=on_out)
    other = LoConModule("x", layer, lora_dim=4, alpha=3.0, weight_decompose=True, wd_on_out=on_out)
    assert {k: v.shape for k, v in other.custom_state_dict().items()} == {
        k: v.shape for k, v in adapter.tensors().items()
    }
    close(other.dora_scale, DoRA(layer, adapter.options, torch.Generator()).dora_scale)
    other.load_state_dict(adapter.tensors(), strict=False)
    merged = layer.weight + adapter.delta_weight(layer.weight)
    close(other.get_merged_weight()[0], merged, atol=1e-5, rtol=1e-5)
    mine = adapter(x, layer(x), layer)
    other.apply_to()
    close(layer(x), mine, atol=1e-5, rtol=1e-5)


def test_equals_peft(case):
    """Output, gradients (none through the norm) and files, in both directions."""
    layer, x = case
    adapter = adapter_on(layer)
    mine = adapter(x, layer(x), layer)
    mine.square().sum().backward()
    peft = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["0"]))
    tensors = files.write(DIALECTS["peft"], {("net", "0"): adapter.tensors()})
    theirs = {k + ".weight" * k.endswith("vector"): v.shape for k, v in get_peft_model_state_dict(peft).items()}
    assert theirs == {k: v.shape for k, v in tensors.items()}
    assert not set_peft_model_state_dict(peft, dict(tensors)).unexpected_keys
    wrapped = peft.base_model.model[0]
    output = wrapped(x)
    close(output, mine, atol=1e-5, rtol=1e-5)
    output.square().sum().backward()
    close(
        wrapped.lora_magnitude_vector.default.weight.grad.flatten(),
        adapter.dora_scale.grad.flatten(),
        atol=1e-4,
        rtol=1e-4,
    )
    close(wrapped.lora_A.default.weight.grad, adapter.lora_down.weight.grad, atol=1e-4, rtol=1e-4)
    back = files.read([DIALECTS["peft"]], get_peft_model_state_dict(peft), [("net", "0")])["net", "0"]
    assert back[DORA].shape == adapter.dora_scale.shape
    kind, options = from_tensors(back)
    again = kind(layer, options, torch.Generator())
    again.load_tensors(back)
    close(again.delta_weight(layer.weight), adapter.delta_weight(layer.weight), atol=1e-5, rtol=1e-5)


@AXES
def test_no_effect_at_birth_and_linear_in_the_multiplier(case, on_out):
    layer, x = case
    y = layer(x)
    assert torch.equal(DoRA(layer, DoRA.Options(rank=4, wd_on_out=on_out), torch.Generator())(x, y, layer), y)
    adapter = adapter_on(layer, wd_on_out=on_out)
    whole = adapter(x, y, layer) - y
    for strength in (-0.7, 0.5, torch.tensor([0.25, 2.0])):
        adapter.context.multiplier = strength
        times = strength if isinstance(strength, float) else strength.view(-1, *[1] * (y.ndim - 1))
        close(adapter(x, y, layer), y + times * whole, atol=1e-5, rtol=1e-5)


@AXES
def test_files_know_the_axis(on_out):
    layer = nn.Conv2d(6, 9, 3)
    tensors = adapter_on(layer, wd_on_out=on_out).tensors()
    for dialect in ("kohya", "comfy"):
        written = files.write(DIALECTS[dialect], {("net", "0"): tensors})
        assert next(t for name, t in written.items() if name.endswith(".dora_scale")).shape == tensors[DORA].shape
    assert from_tensors(tensors)[0] is DoRA
    kind, options = from_tensors(tensors, LoRA)
    assert kind is LoRA
    assert (options.dora_wd, options.wd_on_out) == (True, on_out)
    assert LoRA.read(tensors) == replace(options, alpha=3.0)
    if not on_out:
        with pytest.raises(UserError, match="by input column"):
            files.write(DIALECTS["peft"], {("net", "0"): tensors})


def test_pieces_of_a_fused_layer():
    """Cut and joined exactly on the output axis; else refused, as is a fused layer that lacks a piece's magnitudes."""
    torch.manual_seed(0)
    layer, rows = nn.Linear(6, 9), (4, 3, 2)
    adapter = adapter_on(layer)
    merged = (layer.weight + adapter.delta_weight(layer.weight)).split(rows)
    pieces = DoRA.cut(adapter.tensors(), rows)
    for i, (tensors, weight) in enumerate(zip(pieces, layer.weight.split(rows), strict=True)):
        alone = nn.Linear(6, rows[i])
        alone.weight.data = weight.data.clone()
        piece = DoRA(alone, DoRA.Options(rank=4), torch.Generator())
        piece.load_tensors(tensors)
        close(weight + piece.delta_weight(weight), merged[i], atol=1e-6, rtol=1e-5)
    back = DoRA.join(dict(enumerate(pieces)), rows)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in adapter.tensors().items()}
    with torch.no_grad():
        pieces[0]["lora_down.weight"] = pieces[0]["lora_down.weight"] + 1  # now of separate factors
    joined = DoRA.join(dict(enumerate(pieces)), rows)
    assert joined["lora_down.weight"].shape == (12, 6)
    close(joined[DORA], adapter.dora_scale.detach())
    with pytest.raises(UserError, match="lacks the magnitudes"):
        DoRA.join({0: pieces[0], 2: pieces[2]}, rows)
    by_input = adapter_on(layer, wd_on_out=False).tensors()
    for refused in (lambda: DoRA.cut(by_input, rows), lambda: DoRA.join(dict.fromkeys(range(3), by_input), rows)):
        with pytest.raises(UserError, match="by input column"):
            refused()


@AXES
def test_rows_in_another_order(on_out):
    """Which magnitude belongs to which row moves with it; those of the columns stay."""
    torch.manual_seed(0)
    layer, order = nn.Linear(6, 9), torch.randperm(9)
    adapter = adapter_on(layer, wd_on_out=on_out)
    merged = (layer.weight + adapter.delta_weight(layer.weight))[order]
    other = nn.Linear(6, 9)
    other.weight.data = layer.weight.data[order]
    moved = DoRA(other, adapter.options, torch.Generator())
    moved.load_tensors(DoRA.move_rows(adapter.tensors(), lambda t: t[order]))
    close(other.weight + moved.delta_weight(other.weight), merged, atol=1e-6, rtol=1e-5)


def test_with_separate_pieces_and_back():
    torch.manual_seed(0)
    layer = nn.Linear(6, 9)
    options = DoRA.Options(rank=2, alpha=3.0, pieces=(4, 3, 2))
    first, second = (DoRA(layer, options, torch.Generator().manual_seed(i)) for i in range(2))
    with torch.no_grad():
        for p in first.parameters():
            p += 0.1 * torch.randn(p.shape)
    second.load_tensors(first.tensors())
    close(second.delta_weight(layer.weight), first.delta_weight(layer.weight), atol=0, rtol=0)
    x = torch.randn(2, 6)
    close(
        nn.functional.linear(x, layer.weight + first.delta_weight(layer.weight), layer.bias), second(x, layer(x), layer)
    )


def test_no_max_norm():
    with pytest.raises(UserError, match="DoRA"):
        adapter_on(nn.Linear(3, 3)).scale_norm(1.0)
