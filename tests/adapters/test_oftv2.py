"""OFT on a layer's input against PEFT, given the same rotations."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from layers import LAYERS
from peft import OFTConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from small import disturb, insert
from torch import nn

from sfumato.adapters import AdapterPlan, files, from_tensors
from sfumato.adapters.oftv2 import OFTv2, OFTv2Options
from sfumato.errors import UserError
from sfumato.formats.dialect import Dialect

close = torch.testing.assert_close
HEAD = "base_model.model.0."


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")  # 7 is adjusted
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "conv3x3_dilated"])  # which PEFT refuses
@pytest.mark.parametrize(("size", "series"), [(4, True), (4, False), (7, True)])
def test_equals_peft(name, size, series):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    config = OFTConfig(oft_block_size=size, target_modules=["0"], use_cayley_neumann=series, init_weights=False)
    peft = get_peft_model(nn.Sequential(deepcopy(layer)), config)
    file = {key.removeprefix(HEAD): t for key, t in get_peft_model_state_dict(peft).items()}
    kind, options = from_tensors(file)
    assert kind is OFTv2 and options.use_cayley_neumann
    adapter = OFTv2(layer, OFTv2Options(rank=size, use_cayley_neumann=series), torch.Generator())
    adapter.load_tensors(file)
    x_in = adapter.adapt_input(x)
    y = adapter(x_in, layer(x_in), layer)
    if name != "conv3x3":  # there PEFT's forward is not what its merged weights do, not even at the start
        close(y, peft(x).detach(), atol=1e-5, rtol=1e-5)

    written = adapter.tensors()
    assert written.keys() == ({"oft_R.weight"} if series else {"oft_R.weight", "oft_R.exact"})
    again = from_tensors(written)[1]
    assert (again.rank, again.use_cayley_neumann) == (adapter.size, series)
    if not series:
        with pytest.raises(UserError, match="set use_cayley_neumann=False"):
            OFTv2(layer, OFTv2Options(rank=size), torch.Generator()).load_tensors(written)
    set_peft_model_state_dict(peft, {HEAD + "oft_R.weight": written["oft_R.weight"]})
    merged = peft.merge_and_unload()[0]
    close(layer.weight + adapter.delta_weight(layer.weight), merged.weight.detach(), atol=1e-5, rtol=1e-5)
    close(y, merged(x).detach(), atol=1e-5, rtol=1e-5)


def test_the_series_is_near_the_rotation():
    """Up to the 4th power of the angles; the exact way turns in the other direction, as in PEFT."""
    layer = nn.Linear(8, 3)
    series = OFTv2(layer, OFTv2Options(rank=4), torch.Generator())
    nn.init.normal_(series.oft_R["weight"], std=0.02)
    exact = OFTv2(layer, OFTv2Options(rank=4, use_cayley_neumann=False), torch.Generator())
    with torch.no_grad():
        exact.oft_R["weight"].copy_(-series.oft_R["weight"])
    close(series.rotations(), exact.rotations(), atol=1e-4, rtol=0)
    r = exact.rotations().double() + torch.eye(4)
    close(r @ r.mT, torch.eye(4).double().expand(2, 4, 4), atol=1e-6, rtol=0)


def test_forms_of_other_programs():
    """PEFT's block_share, and OneTrainer's scaled rotations."""
    layer = nn.Linear(8, 3)
    own = {"oft_R.weight": torch.randn(2, 6, generator=torch.Generator().manual_seed(0))}
    shared, scaled = (OFTv2(layer, from_tensors(own)[1], torch.Generator()) for _ in range(2))
    shared.load_tensors({"oft_R.weight": own["oft_R.weight"][:1]})
    close(shared.tensors()["oft_R.weight"], own["oft_R.weight"][:1].expand(2, 6))
    file = {**own, "oft_R.scaled_oft": torch.tensor(1)}
    scaled.load_tensors(file)
    close(scaled.tensors()["oft_R.weight"], own["oft_R.weight"] / 6**0.5)
    assert from_tensors(file)[0] is OFTv2


def test_pefts_names_hold_it(net):
    inserted = insert(net, AdapterPlan(kind=OFTv2, rank=4, conv_rank=4))
    disturb(inserted)
    peft = Dialect(name="peft", prefix={"denoiser": "base_model.model."}, fold_alpha=True)
    keys = files.write(peft, inserted.state())
    assert "base_model.model.block.to_q.oft_R.weight" in keys
    read = files.read([peft], keys, [("denoiser", path) for path, _ in net.named_modules()])
    assert all(torch.equal(t, read[path][leaf]) for path, own in inserted.state().items() for leaf, t in own.items())


def test_pieces_of_a_fused_layer_share_its_input():
    tensors = {"oft_R.weight": torch.randn(2, 6)}
    pieces = OFTv2.cut(tensors, [OFTv2.row_count(tensors)] * 3)
    assert all(torch.equal(piece["oft_R.weight"], tensors["oft_R.weight"]) for piece in pieces)
    assert torch.equal(OFTv2.join(dict(enumerate(pieces)), [4, 4, 4])["oft_R.weight"], tensors["oft_R.weight"])
    with pytest.raises(UserError, match="unless they are equal"):
        OFTv2.join({0: tensors, 1: {"oft_R.weight": torch.zeros(2, 6)}}, [4, 4])
    with pytest.raises(UserError, match="a layer of 7 inputs has no blocks"):
        OFTv2(nn.Linear(7, 3), OFTv2Options(rank=3), torch.Generator())
