"""LoHa against LyCORIS and PEFT, given the same weights."""

from __future__ import annotations

import pytest
import torch
from larger import LAYERS
from lycoris.functional import loha as functional
from lycoris.modules.loha import LohaModule
from peft import LoHaConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from sfumato.adapters import from_tensors
from sfumato.adapters.loha import LoHa, LoHaOptions
from sfumato.errors import UserError

close = torch.testing.assert_close


def made(layer: nn.Module, **options: object) -> LoHa:
    """An adapter with some effect."""
    adapter = LoHa(layer, LoHaOptions(**options), torch.Generator().manual_seed(1))
    nn.init.normal_(adapter.hada_w2_a, std=0.2)
    return adapter


CASES = [(name, rank, tucker) for name in LAYERS for rank in (2, 5) for tucker in {False, name.startswith("conv")}]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    """(layer, adapter, input); the second rank makes the built matrix the cheaper one."""
    name, rank, tucker = request.param
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    return layer, made(layer, rank=rank, alpha=3.0, use_tucker=tucker), torch.randn(shape)


def lycoris(layer: nn.Module, adapter: LoHa) -> LohaModule:
    options = adapter.options
    other = LohaModule("x", layer, lora_dim=options.rank, alpha=options.alpha, use_tucker=options.use_tucker)
    missing = other.load_state_dict(adapter.tensors(), strict=False)
    assert not missing.unexpected_keys
    assert not missing.missing_keys
    return other


def test_equals_lycoris(case):
    layer, adapter, x = case
    x.requires_grad_()
    other = lycoris(layer, adapter)
    y, delta = adapter(x, layer(x), layer), adapter.delta_weight(layer.weight)
    close(layer.weight + delta, layer.weight + other.get_weight(layer.weight.shape), atol=1e-5, rtol=1e-5)
    cotangent = torch.randn(y.shape)
    grads = torch.autograd.grad(y, [x, *adapter.parameters()], cotangent)
    other.apply_to()
    theirs = layer(x)
    close(y, theirs, atol=1e-5, rtol=1e-5)
    names = ["x", *dict(adapter.named_parameters())]
    own = dict(other.named_parameters())
    wanted = torch.autograd.grad(theirs, [x, *(own[name] for name in names[1:])], cotangent)
    for name, mine, their in zip(names, grads, wanted, strict=True):
        close(mine, their, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_equals_lycoris_functional(case):
    layer, adapter, _ = case
    t = adapter.tensors()
    a1, b1, a2, b2 = (t[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
    delta = functional.diff_weight(
        b1, a1, b2, a2, t.get("hada_t1"), t.get("hada_t2"), gamma=torch.tensor(adapter.options.scale)
    )
    close(adapter.delta_weight(layer.weight), delta.view(layer.weight.shape), atol=1e-5, rtol=1e-5)


def test_equals_peft(case):
    layer, adapter, x = case
    options = adapter.options
    mine, delta, folded = (
        adapter(x, layer(x), layer),
        adapter.delta_weight(layer.weight),
        LoHa.fold_alpha(adapter.tensors()),
    )
    config = LoHaConfig(
        r=options.rank, alpha=options.rank, target_modules=["0"], use_effective_conv2d=options.use_tucker
    )
    peft = get_peft_model(nn.Sequential(layer), config)
    theirs = get_peft_model_state_dict(peft)
    assert {name: t.shape for name, t in theirs.items()} == {
        f"base_model.model.0.{name}": t.shape for name, t in folded.items()
    }
    set_peft_model_state_dict(peft, {name: folded[name.rpartition(".")[2]] for name in theirs})
    close(peft.base_model.model[0].get_delta_weight("default"), delta, atol=1e-5, rtol=1e-5)
    close(peft(x), mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tucker", [False, True])
def test_files_of_lycoris_load(tucker):
    layer = nn.Conv2d(6, 9, 3)
    other = LohaModule("x", layer, lora_dim=3, alpha=2.0, use_tucker=tucker)
    nn.init.normal_(other.hada_w2_a)
    tensors = {name: t.detach() for name, t in other.custom_state_dict().items()}
    kind, options = from_tensors(tensors)
    assert kind is LoHa
    assert (options.rank, options.alpha, options.use_tucker) == (3, 2.0, tucker)
    adapter = LoHa(layer, options, torch.Generator())
    adapter.load_tensors(tensors)
    close(adapter.delta_weight(layer.weight), other.get_weight(layer.weight.shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tucker", [False, True])
def test_start_values_are_of_lycoris_distributions(tucker):
    layer = nn.Conv2d(200, 200, 3)
    mine = LoHa(layer, LoHaOptions(rank=64, use_tucker=tucker), torch.Generator().manual_seed(0))
    theirs = LohaModule("x", layer, lora_dim=64, use_tucker=tucker)
    for name, parameter in mine.named_parameters():
        assert parameter.std().item() == pytest.approx(getattr(theirs, name).std().item(), rel=0.03), name
        assert parameter.mean().abs() < 0.05


@pytest.mark.parametrize("rank", [2, 9])
def test_keeps_little_for_the_backward(rank):
    """The matrix is as large as the layer's weight: one that is kept for each layer doubles the net."""
    layer = nn.Linear(64, 96, bias=False).requires_grad_(False)
    adapter, x = made(layer, rank=rank), torch.randn(1, 2, 64, requires_grad=True)
    assert adapter.dense == (rank == 9)
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = adapter.delta(x)
    y.sum().backward()
    factors = sum(p.numel() for p in adapter.parameters())
    pairs = rank * rank * (64 + 96 + 2)
    assert sum(kept.values()) <= factors + x.numel() + (0 if adapter.dense else pairs)


def split(whole: Tensor) -> list[Tensor]:
    return list(whole.split([4, 6]))


@pytest.mark.parametrize("tucker", [False, True])
def test_a_fused_layers_rows_are_cut_joined_and_moved_exactly(tucker):
    layer = nn.Conv2d(6, 10, 3)
    adapter = made(layer, rank=3, alpha=2.0, use_tucker=tucker)
    tensors, delta = adapter.tensors(), adapter.delta_weight(layer.weight)
    assert LoHa.row_count(tensors) == 10
    pieces = LoHa.cut(tensors, (4, 6))
    for piece, rows in zip(pieces, split(delta), strict=True):
        close(merged(piece, rows), rows, atol=1e-6, rtol=1e-6)
    joined = LoHa.join(dict(enumerate(pieces)), (4, 6))
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], t) for name, t in tensors.items())
    moved = LoHa.move_rows(tensors, lambda t: t.roll(3, 0))
    close(merged(moved, delta), delta.roll(3, 0))


def merged(tensors: dict[str, Tensor], like: Tensor) -> Tensor:
    """What a layer's tensors change its weight by."""
    out, channels, *kernel = like.shape
    layer = nn.Conv2d(channels, out, kernel) if kernel else nn.Linear(channels, out)
    kind, options = from_tensors(tensors)
    adapter = kind(layer, options, torch.Generator())
    adapter.load_tensors(tensors)
    return adapter.delta_weight(layer.weight)


def test_pieces_of_different_ranks_are_joined_at_the_sum_of_them():
    layer = nn.Linear(6, 4)
    first, third = made(layer, rank=2, alpha=1.0), made(nn.Linear(6, 5), rank=3, alpha=2.0)
    joined = LoHa.join({0: first.tensors(), 2: third.tensors()}, (4, 3, 5))
    assert len(joined["hada_w1_b"]) == 5
    wanted = torch.cat([first.delta_weight(layer.weight), torch.zeros(3, 6), third.delta_weight(torch.empty(5, 6))])
    close(merged(joined, wanted), wanted, atol=1e-6, rtol=1e-6)


def test_pieces_in_tuckers_form_are_refused_unless_they_share_it():
    piece = made(nn.Conv2d(6, 4, 3), use_tucker=True).tensors()
    with pytest.raises(UserError, match="Tucker"):
        LoHa.join({1: piece}, (4, 4))


def test_lora_plus_is_for_the_factor_that_starts_at_zero():
    adapter = LoHa(nn.Linear(3, 4), LoHaOptions(), torch.Generator())
    assert [name for name, p in adapter.named_parameters() if any(p is q for q in adapter.loraplus_parameters())] == [
        "hada_w2_a"
    ]


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="circular"), nn.Conv1d(2, 2, 1)]
)
def test_refuses_what_it_cannot_follow(layer):
    with pytest.raises(TypeError, match="adapters go on"):
        LoHa(layer, LoHaOptions(), torch.Generator())
