"""LoKr against LyCORIS and PEFT, given the same weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from larger import LAYERS
from lycoris.functional import lokr as functional
from lycoris.functional.general import factorization as theirs_of
from lycoris.modules.lokr import LokrModule
from peft import LoKrConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lokr.layer import factorization as peft_of
from torch import Tensor, nn

from sfumato.adapters import from_tensors, parse
from sfumato.adapters.insert import choose
from sfumato.adapters.lokr import LoKr, LoKrOptions, factorization
from sfumato.config import NetworkConfig
from sfumato.errors import UserError

close = torch.testing.assert_close

FORMS = {
    "full": {"rank": 8},
    "full_matrix": {"rank": 2, "full_matrix": True, "factor": 2},
    "thin": {"rank": 2},
    "factor": {"rank": 2, "factor": 4},
    "one": {"rank": 3, "factor": 1},
    "unbalanced": {"rank": 1, "unbalanced_factorization": True},
    "both": {"rank": 1, "decompose_both": True, "factor": 6},
    "first": {"rank": 2, "decompose_both": True, "unbalanced_factorization": True},
    "tucker": {"rank": 2, "use_tucker": True},
    "tucker_both": {"rank": 1, "use_tucker": True, "decompose_both": True, "factor": 3},
}
CASES = [(name, form) for name in LAYERS for form in FORMS if "conv" in name or "tucker" not in form]


def made(layer: nn.Module, seed: int = 1, **options: object) -> LoKr:
    """An adapter with some effect."""
    adapter = LoKr(layer, LoKrOptions(**options), torch.Generator().manual_seed(seed))
    for name, parameter in adapter.named_parameters():
        if name in ("lokr_w2", "lokr_w2_b"):
            nn.init.normal_(parameter, std=0.5)
    return adapter


@pytest.fixture(params=CASES, ids=str)
def case(request):
    """(layer, adapter, input, LyCORIS' own name of the form)."""
    name, form = request.param
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    return layer, made(layer, alpha=3.0, **FORMS[form]), torch.randn(shape)


def lycoris(layer: nn.Module, options: LoKrOptions) -> LokrModule:
    return LokrModule(
        "x",
        layer,
        lora_dim=options.rank,
        alpha=options.alpha,
        factor=options.factor,
        decompose_both=options.decompose_both,
        full_matrix=options.full_matrix,
        use_tucker=options.use_tucker,
        unbalanced_factorization=options.unbalanced_factorization,
    )


@settings(deadline=None, max_examples=300, derandomize=True)
@given(size=st.integers(1, 6000), factor=st.one_of(st.just(-1), st.integers(1, 200)))
def test_sizes_are_divided_as_by_lycoris(size, factor):
    assert factorization(size, factor) == theirs_of(size, factor)


def test_equals_lycoris(case):
    layer, adapter, x = case
    x.requires_grad_()
    other = lycoris(layer, adapter.options)
    own = {name: t.detach() for name, t in other.custom_state_dict().items()}
    assert {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in adapter.tensors().items()}
    missing = other.load_state_dict(adapter.tensors(), strict=False)
    assert not missing.unexpected_keys + missing.missing_keys
    assert own["alpha"] == adapter.alpha
    delta = adapter.delta_weight(layer.weight)
    close(delta, other.get_weight(layer.weight.shape), atol=1e-5, rtol=1e-5)
    y = adapter(x, layer(x), layer)
    cotangent = torch.randn(y.shape)
    grads = torch.autograd.grad(y, [x, *adapter.parameters()], cotangent)
    other.apply_to()
    theirs = layer(x)
    close(y, theirs, atol=1e-5, rtol=1e-5)
    names = ["x", *dict(adapter.named_parameters())]
    parameters = dict(other.named_parameters())
    wanted = torch.autograd.grad(theirs, [x, *(parameters[name] for name in names[1:])], cotangent)
    for name, mine, their in zip(names, grads, wanted, strict=True):
        close(mine, their, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_equals_lycoris_functional(case):
    layer, adapter, _ = case
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    delta = functional.kron_weight(*map(adapter.tensors().get, names), scale=adapter.options.scale)
    close(adapter.delta_weight(layer.weight), delta.view(layer.weight.shape), atol=1e-5, rtol=1e-5)


def test_equals_peft(case):
    """PEFT puts a `factor` above a size's square root first, LyCORIS the smaller divisor; files have either."""
    layer, adapter, x = case
    options = adapter.options
    config = LoKrConfig(
        r=options.rank,
        alpha=options.rank,
        target_modules=["0"],
        use_effective_conv2d=options.use_tucker,
        decompose_both=options.decompose_both,
        decompose_factor=options.factor,
        init_weights=False,
    )
    peft = get_peft_model(nn.Sequential(layer), config)
    theirs = {name.rpartition(".")[2]: t for name, t in get_peft_model_state_dict(peft).items()}
    close(merged(theirs, layer.weight), peft.base_model.model[0].get_delta_weight("default"), atol=1e-5, rtol=1e-5)
    folded = LoKr.fold_alpha(adapter.tensors())
    if {name: t.shape for name, t in theirs.items()} != {name: t.shape for name, t in folded.items()}:
        divided = [
            peft_of(size, options.factor) != factorization(size, options.factor) for size in layer.weight.shape[:2]
        ]
        assert options.unbalanced_factorization or options.full_matrix or any(divided)
        return
    set_peft_model_state_dict(peft, {f"base_model.model.0.{name}": t for name, t in folded.items()})
    delta = adapter.delta_weight(layer.weight)
    close(peft.base_model.model[0].get_delta_weight("default"), delta, atol=1e-5, rtol=1e-5)
    close(peft(x), adapter(x, peft.base_model.model[0].base_layer(x), layer), atol=1e-5, rtol=1e-5)


def test_a_file_alone_says_how_the_sizes_were_divided(case):
    layer, adapter, x = case
    tensors = adapter.tensors()
    kind, options = from_tensors(tensors)
    assert kind is LoKr
    assert options.scale == adapter.options.scale
    again = LoKr(layer, options, torch.Generator())
    again.load_tensors(tensors)
    assert torch.equal(again(x, layer(x), layer), adapter(x, layer(x), layer))
    assert again.tensors()["alpha"] == tensors["alpha"]


@pytest.mark.parametrize("alpha", [0.5, 8.0, 1e10])
def test_alpha_is_ignored_without_products(alpha):
    """LyCORIS and ComfyUI do so; ai-toolkit writes 1e10 there."""
    layer = nn.Linear(24, 36)
    adapter = made(layer, rank=8)
    tensors = {**adapter.tensors(), "alpha": torch.tensor(alpha)}
    wanted = adapter.delta_weight(layer.weight)
    adapter.load_tensors(tensors)
    close(adapter.delta_weight(layer.weight), wanted)
    _, options = from_tensors(tensors)
    again = LoKr(layer, options, torch.Generator())
    again.load_tensors(tensors)
    close(again.delta_weight(layer.weight), wanted)
    assert 1 <= again.tensors()["alpha"] == options.rank <= 36


def test_start_values_are_of_lycoris_distributions():
    layer = nn.Conv2d(400, 400, 3)
    for more in ({}, {"use_tucker": True}, {"full_matrix": True}, {"decompose_both": True, "factor": 25}):
        options = LoKrOptions(rank=8, **more)
        mine, theirs = LoKr(layer, options, torch.Generator().manual_seed(0)), lycoris(layer, options)
        for name, parameter in mine.named_parameters():
            wanted = getattr(theirs, name)
            assert parameter.abs().max().item() == pytest.approx(wanted.abs().max().item(), rel=0.05), name
            assert parameter.std().item() == pytest.approx(wanted.std().item(), rel=0.15), name


@pytest.mark.parametrize("form", ["full", "thin", "both", "tucker"])
def test_every_tensor_learns_in_the_second_step(form):
    layer = nn.Conv2d(36, 36, 3).requires_grad_(False)
    adapter = LoKr(layer, LoKrOptions(**FORMS[form]), torch.Generator().manual_seed(0))
    optimizer, x = torch.optim.SGD(adapter.parameters(), lr=0.1), torch.randn(2, 36, 5, 5)
    for _ in range(2):
        optimizer.zero_grad()
        adapter(x, layer(x), layer).square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_every_order_of_the_factors_gives_the_same(case):
    layer, adapter, x = case
    x.requires_grad_()
    wanted = adapter.operation(x, adapter.product(layer.weight) / adapter.options.scale)
    cotangent = torch.randn(wanted.shape)
    (grad,) = torch.autograd.grad(wanted, x, cotangent)
    for turn in range(-1, len(adapter._second()) + 1):
        adapter.turn = turn
        delta = adapter.delta(x)
        close(delta, wanted, atol=1e-5, rtol=1e-5)
        close(torch.autograd.grad(delta, x, cotangent)[0], grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "turn"),
    [
        ("nn.Linear(64, 64)", -1),  # what is written between takes longer than the product's multiplications
        ("nn.Linear(127, 3001)", 1),  # primes: the first factor is 1x1, the second one thin
        ("nn.Linear(1280, 1280)", 1),  # through the two thin factors, the small one between them
        ("nn.Conv2d(320, 640, 3)", 2),
    ],
)
def test_the_product_is_built_only_where_that_is_no_dearer(layer, turn):
    with torch.device("meta"):
        made_of = eval(layer)
    assert LoKr(made_of, LoKrOptions(rank=4, use_tucker=True), torch.Generator()).turn == turn


@pytest.mark.parametrize("name", ["adapter.sdxl.lokr", "adapter.anima.lokr"])
def test_shapes_are_those_of_sd_scripts(name):
    """Each layer of a table by itself; its sizes are those of the Kronecker product."""
    table = json.loads(
        gzip.decompress((Path(__file__).parents[1] / "fixtures" / "keys" / f"{name}.json.gz").read_bytes())
    )
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in table.items():
        layer, leaf = key.split(".")
        layers.setdefault(layer, {})[leaf] = tuple(shape)
    for wanted in layers.values():
        core = wanted.get("lokr_t2")
        (rows, columns), up, down = wanted["lokr_w1"], wanted["lokr_w2_a"], wanted["lokr_w2_b"]
        sizes = columns * down[1], rows * up[1 if core else 0]
        with torch.device("meta"):
            layer = nn.Conv2d(*sizes, core[2:]) if core else nn.Linear(*sizes)
        adapter = LoKr(layer, LoKrOptions(rank=4, use_tucker=True), torch.Generator())
        assert {leaf: tuple(t.shape) for leaf, t in adapter.tensors().items()} == wanted


def merged(tensors: dict[str, Tensor], like: Tensor) -> Tensor:
    """What a layer's tensors change its weight by."""
    out, channels, *kernel = like.shape
    layer = nn.Conv2d(channels, out, kernel) if kernel else nn.Linear(channels, out)
    kind, options = from_tensors(tensors)
    adapter = kind(layer, options, torch.Generator())
    adapter.load_tensors(tensors)
    return adapter.delta_weight(layer.weight)


@pytest.mark.parametrize("form", ["full", "thin", "both", "tucker"])
def test_a_fused_layers_rows_are_cut_joined_and_moved_exactly(form):
    layer = nn.Conv2d(36, 36, 3)
    adapter = made(layer, alpha=2.0, **FORMS[form])
    tensors, delta, rows = adapter.tensors(), adapter.delta_weight(layer.weight), (12, 24)
    assert LoKr.row_count(tensors) == 36
    pieces = LoKr.cut(tensors, rows)
    for piece, part in zip(pieces, delta.split(rows), strict=True):
        close(merged(piece, part), part)
    joined = LoKr.join(dict(enumerate(pieces)), rows)
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], t) for name, t in tensors.items())
    second = LoKr.join({1: pieces[1]}, rows)
    close(merged(second, delta), torch.cat([torch.zeros_like(delta[:12]), delta[12:]]))
    moved = LoKr.move_rows(tensors, lambda t: torch.cat(t.chunk(2)[::-1]))
    close(merged(moved, delta), delta.roll(18, 0))
    close(merged(LoKr.fold_alpha(tensors), delta), delta)


def test_what_has_no_exact_form_is_refused():
    tensors = made(nn.Linear(24, 36), rank=2).tensors()
    with pytest.raises(UserError, match="second factor has 6 rows, of which pieces of 9, 27 rows are no multiple"):
        LoKr.cut(tensors, (9, 27))
    with pytest.raises(UserError, match="do not move 6 together"):
        LoKr.move_rows(tensors, lambda t: t.roll(3, 0))
    with pytest.raises(UserError, match="unless they share a second factor"):
        LoKr.join({0: tensors, 1: made(nn.Linear(24, 36), seed=2, rank=2).tensors()}, (36, 36))


def test_lora_plus_is_for_the_first_factor():
    for more, wanted in (({}, ["lokr_w1"]), ({"decompose_both": True}, ["lokr_w1_a", "lokr_w1_b"])):
        adapter = LoKr(nn.Linear(36, 36), LoKrOptions(rank=2, **more), torch.Generator())
        plus = adapter.loraplus_parameters()
        assert [name for name, p in adapter.named_parameters() if any(p is q for q in plus)] == wanted


def test_a_rank_above_all_means_full_matrices():
    plan = parse(NetworkConfig(network_module="networks.lokr", network_dim=100_000, network_args=("factor=4",)))
    (target,) = choose(nn.Sequential(nn.Linear(24, 36)), "denoiser", {"linear": ("0",)}, plan)
    assert LoKr(target.layer, target.options, torch.Generator()).lokr_w2.shape == (9, 6)


@pytest.mark.parametrize("factor", [0, -2])
def test_factors_that_divide_nothing_are_refused(factor):
    with pytest.raises(UserError, match=f"factor={factor}: expected 1 or more, or -1"):
        LoKrOptions(factor=factor)


def test_a_files_form_goes_before_the_settings():
    config = NetworkConfig(
        network_module="lokr", network_args=("factor=4",), dim_from_weights=True, network_weights="x.safetensors"
    )
    with pytest.raises(UserError, match="factor: does nothing, as dim_from_weights"):
        parse(config)


def test_doras_magnitudes_go_with_the_rows():
    factors = made(nn.Linear(24, 36), rank=2).tensors()
    for magnitude, moves in ((torch.rand(36, 1), True), (torch.rand(1, 24), False)):
        tensors = {**factors, "dora_scale": magnitude}
        _, options = from_tensors(tensors)
        assert (options.dora_wd, options.wd_on_out) == (True, moves)
        moved = LoKr.move_rows(tensors, lambda t: t.roll(6, 0))
        assert torch.equal(moved["dora_scale"], magnitude.roll(6, 0) if moves else magnitude)
        with pytest.raises(UserError, match="PEFT has no LoKr with DoRA"):
            LoKr.fold_alpha(tensors)
        if not moves:
            continue
        pieces = LoKr.cut(tensors, (12, 24))
        assert torch.equal(pieces[1]["dora_scale"], magnitude[12:])
        joined = LoKr.join(dict(enumerate(pieces)), (12, 24))
        assert all(torch.equal(joined[name], t) for name, t in tensors.items())
