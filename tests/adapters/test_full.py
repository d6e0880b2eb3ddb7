"""The whole difference against LyCORIS, given the same weights."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from lycoris.modules.full import FullModule
from small import LAYERS
from torch import nn

from sfumato.adapters import from_tensors
from sfumato.adapters.base import LayerOptions
from sfumato.adapters.full import Full
from sfumato.errors import UserError

close = torch.testing.assert_close


@pytest.mark.parametrize("name", LAYERS)
def test_equals_lycoris(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    trained = deepcopy(layer)
    other = FullModule("x", trained)
    other.apply_to()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn_like(p))
    theirs = other.custom_state_dict()
    kind, options = from_tensors(theirs)
    adapter = kind(layer, options, torch.Generator())
    assert isinstance(adapter, Full) and set(adapter.tensors()) == set(theirs)
    adapter.load_tensors(theirs)
    mine = adapter(x, layer(x), layer)
    close(mine, trained(x).detach(), atol=1e-5, rtol=1e-5)

    with torch.no_grad():
        own = adapter.tensors()
        back = FullModule.make_module_from_state_dict("x", deepcopy(layer), own["diff"], own.get("diff_b"))
    weight, bias = back.get_merged_weight()
    close(layer.weight + adapter.delta_weight(layer.weight), weight, atol=1e-6, rtol=1e-5)
    if layer.bias is not None:
        close(layer.bias + adapter.delta_bias(layer.bias), bias, atol=1e-6, rtol=1e-5)


def test_a_file_without_diff_b_leaves_the_bias():
    adapter = Full(nn.Linear(3, 4), LayerOptions(), torch.Generator())
    nn.init.ones_(adapter.diff_b)
    adapter.load_tensors({"diff": torch.ones(4, 3)})
    assert not adapter.tensors()["diff_b"].any()
    with pytest.raises(UserError, match="diff_b"):
        Full(nn.Linear(3, 4, bias=False), LayerOptions(), torch.Generator()).load_tensors(
            {"diff": torch.ones(4, 3), "diff_b": torch.ones(4)}
        )


def test_pieces_of_a_fused_layer():
    whole = {"diff": torch.randn(6, 3), "diff_b": torch.randn(6)}
    pieces = Full.cut(whole, [1, 3, 2])
    back = Full.join(dict(enumerate(pieces)), [1, 3, 2])
    assert all(torch.equal(back[leaf], t) for leaf, t in whole.items())
    lacking = Full.join({1: pieces[1]}, [1, 3, 2])
    assert torch.equal(lacking["diff"][1:4], whole["diff"][1:4]) and lacking["diff_b"].count_nonzero() == 3
