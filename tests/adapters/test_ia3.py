"""(IA)3 against LyCORIS and PEFT, given the same factors."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from lycoris.modules.ia3 import IA3Module
from peft import IA3Config, get_peft_model
from small import LAYERS, Net, disturb, insert
from torch import nn

from sfumato.adapters import AdapterPlan, files, from_tensors
from sfumato.adapters.ia3 import IA3, IA3Options
from sfumato.errors import UserError
from sfumato.formats.adapter_check import check_adapter
from sfumato.formats.dialect import Dialect

close = torch.testing.assert_close
KOHYA = Dialect(name="kohya", prefix={"denoiser": "lora_unet_"}, separator="_")


def adapted(adapter: IA3, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = adapter.adapt_input(x)
    return adapter(x, layer(x), layer)


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().requires_grad_(False), torch.randn(shape)


@pytest.mark.parametrize("on_input", [False, True])
def test_equals_lycoris(layer_and_input, on_input):
    layer, x = layer_and_input
    other = IA3Module("x", layer, train_on_input=on_input)
    nn.init.normal_(other.weight, std=0.3)
    theirs = other.state_dict()
    kind, options = from_tensors(theirs)
    assert kind is IA3 and options == IA3Options(train_on_input=on_input)
    adapter = IA3(layer, options, torch.Generator())
    adapter.load_tensors(theirs)
    close(adapter.delta_weight(layer.weight), other.get_diff_weight()[0], atol=1e-6, rtol=1e-5)
    mine = adapted(adapter, layer, x)
    back = IA3Module("x", layer, train_on_input=on_input)
    back.load_state_dict(adapter.tensors())
    back.apply_to()
    close(layer(x), mine, atol=1e-5, rtol=1e-5)  # the bias stays as it is


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_reads_pefts_factors_where_they_scale_no_bias(on_input, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9, bias=bias).requires_grad_(False), torch.randn(2, 5, 6)
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if on_input else [])
    peft = get_peft_model(nn.Sequential(deepcopy(layer)), config)
    factors = peft.base_model.model[0].ia3_l["default"]
    nn.init.normal_(factors, mean=1, std=0.3)
    kind, options = from_tensors({"ia3_l": factors.detach()})
    adapter = kind(layer, options, torch.Generator())
    if bias and not on_input:
        with pytest.raises(UserError, match="scales the layer's bias too"):
            adapter.load_tensors({"ia3_l": factors.detach()})
        return
    adapter.load_tensors({"ia3_l": factors.detach()})
    close(adapted(adapter, layer, x), peft(x).detach(), atol=1e-6, rtol=1e-5)
    assert set(adapter.tensors()) == {"weight", "on_input"}


def test_factors_of_the_other_side_are_refused():
    layer = nn.Linear(6, 6)
    file = IA3(layer, IA3Options(train_on_input=True), torch.Generator()).tensors()
    with pytest.raises(UserError, match="train_on_input"):
        IA3(layer, IA3Options(), torch.Generator()).load_tensors(file)
    with pytest.raises(UserError, match="does not say whether"):
        from_tensors({"ia3_l": torch.ones(1, 6, 1, 1)})


@pytest.mark.parametrize("on_input", [False, True])
def test_a_file_goes_out_and_in(net, x, on_input):
    """`weight` is a checkpoint's name, and an adapter's only beside `on_input`, which is whole numbers in LyCORIS' files."""
    plan = AdapterPlan(kind=IA3, conv_rank=1, more={"train_on_input": on_input})
    inserted = insert(net, plan)
    disturb(inserted)
    keys = files.write(KOHYA, inserted.state())
    check_adapter(keys, "a.safetensors")
    assert "lora_unet_block_to_q.weight" in keys and not keys["lora_unet_block_to_q.on_input"].is_floating_point()
    paths = [("denoiser", path) for path, _ in Net().named_modules()]
    assert files.read([KOHYA], {k: t.half() for k, t in keys.items()}, paths).keys() == inserted.state().keys()
    read = files.read([KOHYA], keys, paths)
    for path, tensors in inserted.state().items():
        assert all(torch.equal(t, read[path][leaf]) for leaf, t in tensors.items())
    with pytest.raises(UserError, match="name no layer"):
        files.read([KOHYA], {"lora_unet_block_to_q.weight": torch.ones(12)}, paths)


def test_pieces_of_a_fused_layer():
    output = {"weight": torch.arange(9.0), "on_input": torch.tensor(0)}
    pieces = IA3.cut(output, [3, 2, 4])
    assert [p["weight"].tolist() for p in pieces] == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    joined = IA3.join(dict(enumerate(pieces)), [3, 2, 4])
    assert torch.equal(joined["weight"], output["weight"])
    joined = IA3.join({0: pieces[0], 2: pieces[2]}, [3, 2, 4])
    assert joined["weight"].tolist() == [0, 1, 2, 0, 0, 5, 6, 7, 8]
    joined = IA3.join({1: {"ia3_l": torch.full((2, 1), 3.0)}}, [3, 2, 4])
    assert joined["ia3_l"].flatten().tolist() == [1, 1, 1, 3, 3, 1, 1, 1, 1]
    moved = IA3.move_rows(
        {"weight": torch.arange(4.0).view(1, 4, 1, 1), "on_input": torch.tensor(0)}, lambda t: t.flip(0)
    )
    assert moved["weight"].flatten().tolist() == [3, 2, 1, 0]

    shared = {"weight": torch.arange(5.0), "on_input": torch.tensor(1)}
    pieces = IA3.cut(shared, [IA3.row_count(shared)] * 2)
    assert all(torch.equal(p["weight"], shared["weight"]) for p in pieces)
    assert torch.equal(IA3.join(dict(enumerate(pieces)), [3, 3])["weight"], shared["weight"])
    for wrong in ({0: pieces[0]}, {0: pieces[0], 1: {**shared, "weight": torch.ones(5)}}):
        with pytest.raises(UserError, match="unless they are equal"):
            IA3.join(wrong, [3, 3])
    assert torch.equal(IA3.move_rows(shared, lambda t: t.flip(0))["weight"], shared["weight"])
