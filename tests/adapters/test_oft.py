"""OFT against LyCORIS, given the same blocks, and against ComfyUI's formula."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from layers import LAYERS
from lycoris.functional import factorization as theirs
from lycoris.modules.diag_oft import DiagOFTModule
from small import Net, disturb, insert
from tinies import headers
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan, files, from_tensors
from sfumato.adapters import kind as adapter_kind
from sfumato.adapters.insert import from_state
from sfumato.adapters.oft import OFT, OFTOptions
from sfumato.errors import UserError
from sfumato.formats.dialect import Dialect
from sfumato.tensors.algebra import cayley, factorization, skew

close = torch.testing.assert_close
KOHYA = Dialect(name="kohya", prefix={"denoiser": "lora_unet_"}, separator="_")


def comfy(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """What ComfyUI (comfy/weight_adapter/oft.py) adds at strength 1: its limit is alpha itself, and it knows no rescale."""
    q = tensors["oft_blocks"] - tensors["oft_blocks"].mT
    if (alpha := tensors["alpha"].item()) > 0 and (norm := q.norm() + 1e-8) > alpha:
        q = q * alpha / norm
    k, n, _ = q.shape
    r = (torch.eye(n) + q) @ torch.linalg.inv(torch.eye(n) - q)
    rows = weight.reshape(k, n, -1)
    return (torch.einsum("knm,knp->kmp", r, rows) - rows).reshape(weight.shape)


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().requires_grad_(False), torch.randn(shape)


@pytest.mark.parametrize(
    ("rank", "constraint", "rescaled"), [(2, 0.0, False), (3, 0.0, True), (4, 0.05, False), (6, 10.0, True)]
)
def test_equals_lycoris(layer_and_input, rank, constraint, rescaled):
    layer, x = layer_and_input
    other = DiagOFTModule("x", layer, lora_dim=rank, constraint=constraint, rescaled=rescaled)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn_like(p))
    options = OFTOptions(rank=rank, constraint=constraint, rescaled=rescaled)
    adapter = OFT(layer, options, torch.Generator())
    assert {n: p.shape for n, p in adapter.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    with torch.no_grad():
        for mine, their in zip(adapter.parameters(), other.parameters(), strict=True):
            mine.copy_(their)
    change = other.get_diff_weight()[0]
    close(adapter.delta_weight(layer.weight), change, atol=1e-5, rtol=1e-5)
    y = adapter(x, layer(x), layer)

    # Their file here: its alpha is the constraint.
    kind, read = from_tensors(other.state_dict())
    assert kind is OFT and read.rescaled == rescaled
    again = OFT(layer, read, torch.Generator())
    again.load_tensors(other.state_dict())
    close(again.delta_weight(layer.weight), change, atol=1e-5, rtol=1e-5)

    # Ours there, and in ComfyUI: the constraint is in the blocks.
    written = adapter.tensors()
    assert written["alpha"] == 0
    with torch.no_grad():
        back = DiagOFTModule.make_module_from_state_dict(
            "x", layer, written["oft_blocks"], written.get("rescale"), written["alpha"]
        )
    close(back.get_diff_weight()[0], change, atol=1e-5, rtol=1e-5)
    if not rescaled:
        close(comfy(layer.weight, written), change, atol=1e-5, rtol=1e-5)
    back.apply_to()
    close(layer(x), y, atol=1e-5, rtol=1e-5)


def test_the_blocks_are_chosen_as_lycoris_and_kohya_choose_them():
    for number in (6, 12, 127, 250, 320, 640, 1280, 3072, 9216):
        for factor in (-1, 1, 2, 4, 8, 12, 16, 100, 4000):
            assert factorization(number, factor) == theirs(number, factor)
    table = {name: shape for name, shape in headers.table("adapter.sdxl.oft").items() if name.endswith("oft_blocks")}
    assert {OFT.shape(k * n, OFTOptions(rank=8, count_blocks=True)) for k, n, _ in table.values()} == set(
        table.values()
    )
    with pytest.raises(UserError, match="640 rows of a layer do not share out over so many blocks"):
        OFT.shape(640, OFTOptions(rank=7, count_blocks=True))
    with pytest.raises(UserError, match="a layer of 127 rows has no blocks"):
        OFT.shape(127, OFTOptions(rank=8))


def test_the_rotation_is_one_to_fp32_also_for_small_angles():
    q = skew(1e-4 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    exact = q.double()
    eye = torch.eye(8, dtype=torch.double)
    r = (eye + exact) @ torch.linalg.inv(eye - exact)
    close(r @ r.mT, eye.expand(3, 8, 8), atol=1e-12, rtol=0)
    close(cayley(q).double(), r - eye, atol=1e-10, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "more"), [("oft", {}), ("boft", {}), ("oftv2", {}), ("oftv2", {"use_cayley_neumann": False})]
)
def test_rotations_are_made_in_fp32_under_autocast_and_of_bf16_weights(kind, more):
    layer, made = nn.Linear(8, 16, bias=False), adapter_kind(kind)
    adapter = made(layer, made.Options(rank=4, **more), torch.Generator())
    nn.init.normal_(next(adapter.parameters()), std=0.05, generator=torch.Generator().manual_seed(0))
    adapter.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rotations = adapter.rotations()
    assert rotations.dtype is torch.float32
    eye = torch.eye(rotations.shape[-1]).double()
    r = rotations.double() + eye
    series = kind == "oftv2" and not more
    close(r @ r.mT, eye.expand_as(r), atol=1e-3 if series else 1e-6, rtol=0)


@pytest.mark.parametrize("constraint", [0.0, 0.02])
def test_training_goes_on_from_a_file_and_from_the_start(net, x, constraint):
    """At the start the norm under the limit is 0; a result has the limit in its blocks, the run's own weights do not."""
    inserted = insert(net, AdapterPlan(kind=OFT, rank=2, conv_rank=2, more={"constraint": constraint}))
    net(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in inserted.parameters())
    disturb(inserted)
    y = net(x)
    assert all(
        torch.equal(a.oft_blocks, a.tensors()["oft_blocks"]) == (not constraint) for a in inserted.by_path().values()
    )
    state = copy.deepcopy(inserted.state())
    inserted.remove()
    held = from_state({"denoiser": net}, state, AdapterPlan(kind=OFT, more={"constraint": constraint}))
    close(net(x), y, atol=1e-6, rtol=1e-5)
    held.remove()


def test_a_file_goes_out_and_in(net):
    """A file's constraint is in its blocks once it has been read, so that another program may read what is written."""
    inserted = insert(net, AdapterPlan(kind=OFT, rank=2, conv_rank=2, more={"rescaled": True}))
    disturb(inserted)
    paths = [("denoiser", path) for path, _ in Net().named_modules()]
    keys = files.write(KOHYA, inserted.state())
    assert all(torch.equal(t, files.write(KOHYA, files.read([KOHYA], keys, paths))[k]) for k, t in keys.items())
    limited = {k: torch.tensor(0.02) if k.endswith("alpha") else t for k, t in keys.items() if "to_q" in k}
    read = files.read([KOHYA], limited, paths)["denoiser", "block.to_q"]
    assert read["alpha"] == 0
    close(skew(read["oft_blocks"]).norm().item(), 0.02 * 12)


def adapter_of(rows: int, tensors: dict[str, Tensor]) -> OFT:
    adapter = OFT(nn.Linear(5, rows), OFT.read(tensors), torch.Generator())
    adapter.load_tensors(tensors)
    return adapter


@pytest.mark.parametrize("rescaled", [False, True])
def test_pieces_of_a_fused_layer(rescaled):
    torch.manual_seed(0)
    weight = torch.randn(12, 5)
    whole = {"oft_blocks": torch.randn(6, 2, 2), "alpha": torch.tensor(0.0)}
    if rescaled:
        whole["rescale"] = 1 + 0.1 * torch.randn(12, 1)
    change = adapter_of(12, whole).delta_weight(weight)
    pieces = OFT.cut(whole, [2, 6, 4])
    changes = [adapter_of(len(w), p).delta_weight(w) for p, w in zip(pieces, weight.split([2, 6, 4]), strict=True)]
    close(torch.cat(changes), change)
    back = OFT.join(dict(enumerate(pieces)), [2, 6, 4])
    assert all(torch.equal(back[leaf], t) for leaf, t in whole.items())
    lacking = adapter_of(12, OFT.join({1: pieces[1]}, [2, 6, 4])).delta_weight(weight)
    close(lacking, torch.cat([torch.zeros(2, 5), change[2:8], torch.zeros(4, 5)]))
    with pytest.raises(UserError, match="blocks of 2 rows has no exact form for pieces of 3, 9 rows"):
        OFT.cut(whole, [3, 9])


def test_pieces_in_blocks_of_several_sizes():
    """kohya's oft_flux: as many blocks in each piece, so of another size in the MLP's."""
    torch.manual_seed(0)
    weight = torch.randn(32, 5)
    parts = {f"oft_blocks.{i}": torch.randn(4, n, n) for i, n in enumerate((1 + 1, 1 + 1, 4))}
    file = {**parts, "alpha": torch.tensor(0.05)}
    rows = [8, 8, 16]
    pieces = [{"oft_blocks": t, "alpha": torch.tensor(0.05)} for t in parts.values()]
    changes = [adapter_of(len(w), p).delta_weight(w) for p, w in zip(pieces, weight.split(rows), strict=True)]
    whole = adapter_of(32, file)
    assert whole.oft_blocks.shape == (8, 4, 4)
    close(whole.delta_weight(weight), torch.cat(changes))
    with pytest.raises(UserError, match=r"pieces of 8, 10 rows has no exact form in blocks of one size \(10\)"):
        OFT.join({0: pieces[0], 1: {"oft_blocks": torch.zeros(2, 5, 5), "alpha": torch.tensor(0.0)}}, [8, 10])


def test_rows_in_another_order():
    torch.manual_seed(0)
    weight = torch.randn(12, 5)
    tensors = {"oft_blocks": torch.randn(3, 4, 4), "alpha": torch.tensor(0.0), "rescale": torch.randn(12, 1)}
    change = adapter_of(12, tensors).delta_weight(weight)
    for move in (lambda t: t.flip(0), lambda t: t.roll(4, 0), lambda t: t.view(3, 2, 2, -1).flip(1).view(12, -1)):
        moved = adapter_of(12, OFT.move_rows(tensors, move))
        close(moved.delta_weight(move(weight)), move(change))
    with pytest.raises(UserError, match="change places with others"):
        OFT.move_rows(tensors, lambda t: t.roll(1, 0))


def test_the_size_of_network_dim_may_be_the_number_of_blocks(net):
    plan = AdapterPlan(kind=OFT, rank=2, conv_rank=2, more={"count_blocks": True})
    for path, adapter in insert(net, plan).by_path().items():
        rows = len(net.get_submodule(path[1]).weight)
        assert adapter.oft_blocks.shape == (2, rows // 2, rows // 2)
    sized = insert(net, replace(plan, more={})).by_path()
    assert sized["denoiser", "block.to_q"].oft_blocks.shape == (6, 2, 2)
