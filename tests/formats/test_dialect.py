"""Adapter names as other programs spell them; PEFT itself is the oracle of its own dialect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.adapters import files as adapter_files
from sfumato.errors import UserError
from sfumato.formats.dialect import AdapterTensors, Dialect, ModulePath
from sfumato.formats.names import SWAP_HALVES, TRANSPOSE, KeyMap, rule

quick = settings(deadline=None, max_examples=25, derandomize=True)

TABLE = KeyMap(
    rule("blocks.{i}.attn.qkv", "layers.{i}.to_q", "layers.{i}.to_k", "layers.{i}.to_v"),
    rule("blocks.{i}.attn.proj", "layers.{i}.to_out"),
    rule("conv_in"),
    rule("final.1", "norm_out", change=SWAP_HALVES),
)
KOHYA = Dialect(name="kohya", prefix={"denoiser": "lora_unet_", "clip_l": "lora_te_"}, separator="_")
COMFY = Dialect(name="comfy", prefix={"denoiser": "diffusion_model.", "clip_l": "text_encoders.clip_l.transformer."})
PEFT = Dialect(
    name="peft",
    prefix={"denoiser": "unet.", "clip_l": "text_encoder."},
    keys={"denoiser": TABLE},
    tensor_names={"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"},
    fold_alpha=True,
)
SPLIT = Dialect(name="split", prefix={"denoiser": "lora_unet_"}, keys={"denoiser": TABLE}, separator="_")
ALL = (KOHYA, COMFY, PEFT)
SITES: list[ModulePath] = [("denoiser", f"blocks.{i}.attn.{name}") for i in range(12) for name in ("qkv", "proj")]
SITES += [
    ("denoiser", "conv_in"),
    ("denoiser", "final.1"),
    ("clip_l", "text_model.layers.0.mlp.fc1"),
    ("clip_l", "text_model.layers.0.mlp.fc10"),
]


def lora(site: ModulePath, rank: int = 2, alpha: float = 1.0, seed: int = 0) -> AdapterTensors:
    g = torch.Generator().manual_seed(seed)
    out = 9 if site[1].endswith("qkv") else 4
    kernel = (3, 3) if "conv" in site[1] else ()
    up = torch.randn(out, rank, *[1 for _ in kernel], generator=g)
    return {
        "lora_down.weight": torch.randn(rank, 5, *kernel, generator=g),
        "lora_up.weight": up,
        "alpha": torch.tensor(alpha),
    }


def loha(rows: int = 9) -> AdapterTensors:
    a, b = (("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b"))
    factors = {leaf: torch.rand(rows, 2) for leaf in a} | {leaf: torch.rand(2, 5) for leaf in b}
    return factors | {"alpha": torch.tensor(1.0)}


def change(leaves: AdapterTensors) -> Tensor:
    """The change of the layer's weight, flattened."""
    if "hada_w1_a" in leaves:
        rank = torch.tensor(len(leaves["hada_w1_b"]))
        one, other = (leaves[f"hada_w{i}_a"] @ leaves[f"hada_w{i}_b"] for i in (1, 2))
        return one * other * (leaves.get("alpha", rank) / rank)
    down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
    return up.flatten(1) @ down.flatten(1) * (leaves["alpha"] / down.shape[0])


def same(a: dict[ModulePath, AdapterTensors], b: dict[ModulePath, AdapterTensors]) -> bool:
    return a.keys() == b.keys() and all(
        x.keys() == b[s].keys() and all(torch.equal(t, b[s][k]) for k, t in x.items()) for s, x in a.items()
    )


@pytest.mark.parametrize("dialect_of", [KOHYA, COMFY, SPLIT], ids=lambda d: d.name)
@quick
@given(
    chosen=st.sets(st.sampled_from(SITES), min_size=1), rank=st.integers(1, 4), alpha=st.sampled_from([1.0, 4.0, 0.5])
)
def test_round_trip_bit_for_bit(dialect_of: Dialect, chosen: set[ModulePath], rank: int, alpha: float) -> None:
    adapters = {
        s: lora(s, rank, alpha, seed) for seed, s in enumerate(SITES) if s in chosen and s[0] in dialect_of.prefix
    }
    written = adapter_files.write(dialect_of, adapters)
    assert same(adapter_files.read([dialect_of], written, SITES), adapters)
    backwards = dict(reversed(written.items()))
    assert list(adapter_files.read([dialect_of], backwards, SITES)) == list(adapters), "the order is that of the sites"


@quick
@given(chosen=st.sets(st.sampled_from(SITES), min_size=1), alpha=st.sampled_from([1.0, 4.0, 0.5]))
def test_peft_keeps_the_change(chosen: set[ModulePath], alpha: float) -> None:
    adapters = {s: lora(s, 2, alpha, seed) for seed, s in enumerate(SITES) if s in chosen}
    written = adapter_files.write(PEFT, adapters)
    assert not any("alpha" in key for key in written)
    back = adapter_files.read(ALL, written, SITES)
    assert back.keys() == adapters.keys()
    for site, leaves in adapters.items():
        torch.testing.assert_close(change(back[site]), change(leaves))


def test_names_are_as_the_programs_spell_them() -> None:
    adapters = {SITES[0]: lora(SITES[0]), SITES[1]: lora(SITES[1]), SITES[-1]: lora(SITES[-1])}
    assert list(adapter_files.write(KOHYA, adapters))[:3] == [
        f"lora_unet_blocks_0_attn_qkv.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")
    ]
    assert "lora_te_text_model_layers_0_mlp_fc10.alpha" in adapter_files.write(KOHYA, adapters)
    assert "diffusion_model.blocks.0.attn.proj.lora_up.weight" in adapter_files.write(COMFY, adapters)
    assert "text_encoders.clip_l.transformer.text_model.layers.0.mlp.fc10.lora_down.weight" in adapter_files.write(
        COMFY, adapters
    )
    peft = adapter_files.write(PEFT, adapters)
    assert {"unet.layers.0.to_out.lora_A.weight", "unet.layers.0.to_k.lora_B.weight"} < peft.keys()
    assert peft["unet.layers.0.to_k.lora_B.weight"].shape == (3, 2)


def test_a_fused_layer_is_cut_exactly() -> None:
    whole = lora(SITES[0], alpha=3.0)
    parts = adapter_files.write(SPLIT, {SITES[0]: whole})
    pieces = [{leaf: parts[f"lora_unet_layers_0_{n}.{leaf}"] for leaf in whole} for n in ("to_q", "to_k", "to_v")]
    assert torch.equal(torch.cat([change(p) for p in pieces]), change(whole))


def test_pieces_of_different_ranks_are_joined_exactly_and_missing_ones_change_nothing() -> None:
    q, v = lora(SITES[1], rank=1, alpha=4.0, seed=1), lora(SITES[1], rank=3, alpha=1.0, seed=2)
    tensors = {f"lora_unet_layers_7_to_q.{k}": t for k, t in q.items()} | {
        f"lora_unet_layers_7_to_v.{k}": t for k, t in v.items()
    }
    ((site, joined),) = adapter_files.read([SPLIT], tensors, SITES).items()
    assert site == ("denoiser", "blocks.7.attn.qkv")
    assert joined["lora_down.weight"].shape == (4, 5)
    torch.testing.assert_close(change(joined), torch.cat([change(q), torch.zeros(4, 5), change(v)]))


@pytest.mark.parametrize("leaves", [lora(("denoiser", "final.1"), alpha=3.0), loha(4)], ids=["lora", "loha"])
def test_rows_that_change_places_do_so_in_the_rows_of_the_factors(leaves: AdapterTensors) -> None:
    """The table moves a whole weight; the adapter's change of it goes the same way, and back."""
    site = ("denoiser", "final.1")
    written = adapter_files.write(SPLIT, {site: leaves})
    there = {leaf: written[f"lora_unet_norm_out.{leaf}"] for leaf in leaves}
    assert torch.equal(change(there), TABLE.to_foreign({"final.1.weight": change(leaves)})["norm_out.weight"])
    assert not torch.equal(change(there), change(leaves))
    (back,) = adapter_files.read([SPLIT], written, SITES).values()
    assert torch.equal(change(back), change(leaves))


def test_rows_of_a_fused_layer_change_places_before_it_is_cut() -> None:
    table = KeyMap(rule("both", "a", "b", change=SWAP_HALVES))
    dialect_of, site = Dialect(name="turned", prefix={"denoiser": ""}, keys={"denoiser": table}), ("denoiser", "both")
    leaves = lora(site)
    written = adapter_files.write(dialect_of, {site: leaves})
    pieces = table.to_foreign({"both.weight": change(leaves)})
    assert all(
        torch.equal(change({leaf: written[f"{n}.{leaf}"] for leaf in leaves}), pieces[f"{n}.weight"])
        for n in ("a", "b")
    )
    assert same(adapter_files.read([dialect_of], written, [site]), {site: leaves})


def test_several_dialects_may_stand_in_one_file() -> None:
    adapters = {s: lora(s, seed=i) for i, s in enumerate(SITES[:2])}
    mixed = adapter_files.write(KOHYA, {SITES[0]: adapters[SITES[0]]}) | adapter_files.write(
        COMFY, {SITES[1]: adapters[SITES[1]]}
    )
    assert same(adapter_files.read(ALL, mixed, SITES), adapters)


@pytest.mark.parametrize(
    "down, up",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
    ],
)
def test_leaves_of_peft_and_diffusers_are_read_under_any_path(down: str, up: str) -> None:
    leaves = lora(SITES[1])
    tensors = {
        f"diffusion_model.blocks.0.attn.proj.{down}": leaves["lora_down.weight"],
        f"diffusion_model.blocks.0.attn.proj.{up}": leaves["lora_up.weight"],
    }
    (got,) = adapter_files.read(ALL, tensors, SITES).values()
    assert got["alpha"].item() == 2, "without alpha the scale is 1"
    assert torch.equal(got["lora_up.weight"], leaves["lora_up.weight"])


def test_other_kinds_have_their_own_names_everywhere() -> None:
    adapters = {SITES[0]: loha(), SITES[1]: loha(4)}
    for dialect_of in (KOHYA, COMFY, SPLIT):
        assert same(adapter_files.read([dialect_of], adapter_files.write(dialect_of, adapters), SITES), adapters)
    back = adapter_files.read([PEFT], adapter_files.write(PEFT, adapters), SITES)
    for site, leaves in adapters.items():
        torch.testing.assert_close(change(back[site]), change(leaves))


def test_rows_that_do_not_share_out_are_refused() -> None:
    with pytest.raises(UserError, match=r"lora_unet_layers_0_to_q: 10 rows .* not 3 pieces"):
        adapter_files.write(SPLIT, {SITES[0]: loha(10)})


def test_every_key_is_claimed_or_refused_with_the_nearest_name() -> None:
    tensors = adapter_files.write(KOHYA, {SITES[0]: lora(SITES[0])})
    strange = {"lora_unet_blocks_0_attn_qvk.lora_up.weight", "lora_unet_blocks_99_attn_qkv.alpha", "conv_in.weight"}
    with pytest.raises(UserError, match="3 of 6 keys of the adapter name no layer") as error:
        adapter_files.read(ALL, tensors | {k: torch.ones(1) for k in strange}, SITES)
    assert all(key in str(error.value) for key in strange)
    assert "lora_unet_blocks_0_attn_qvk.lora_up.weight; did you mean 'lora_unet_blocks_0_attn_qkv'" in str(error.value)


def test_a_checkpoint_is_not_taken_for_an_adapter() -> None:
    with pytest.raises(UserError, match="2 of 2 keys"):
        adapter_files.read(
            ALL, {"diffusion_model.conv_in.weight": torch.ones(1), "diffusion_model.conv_in.bias": torch.ones(1)}, SITES
        )


def test_one_place_is_filled_once() -> None:
    adapters = {SITES[1]: lora(SITES[1])}
    with pytest.raises(UserError, match="two tensors for one place"):
        adapter_files.read(ALL, adapter_files.write(KOHYA, adapters) | adapter_files.write(COMFY, adapters), SITES)


def test_two_layers_of_one_name_are_refused() -> None:
    twins: list[ModulePath] = [("denoiser", "a.b_c"), ("denoiser", "a_b.c")]
    with pytest.raises(UserError, match="two layers share the kohya name"):
        adapter_files.write(KOHYA, {s: lora(s) for s in twins})
    with pytest.raises(ValueError, match="names both"):
        adapter_files.read([KOHYA], {}, twins)


def test_what_a_dialect_has_no_place_for() -> None:
    with pytest.raises(UserError, match="kohya names have no place for 't5'; they hold denoiser, clip_l"):
        adapter_files.write(KOHYA, {("t5", "x"): lora(SITES[1])})


@pytest.mark.parametrize("leaves", [lora(SITES[1]), loha()], ids=["lora", "loha"])
def test_an_adapter_without_an_exact_form_on_the_other_side_is_refused(leaves: AdapterTensors) -> None:
    turned = Dialect(
        name="turned", prefix={"denoiser": ""}, keys={"denoiser": KeyMap(rule("conv_in", "x", change=TRANSPOSE))}
    )
    with pytest.raises(UserError, match="no exact form"):
        adapter_files.write(turned, {("denoiser", "conv_in"): leaves})
    with pytest.raises(UserError, match="no exact form"):
        adapter_files.read([turned], {f"x.{leaf}": t for leaf, t in leaves.items()}, [("denoiser", "conv_in")])


def test_peft_reads_and_writes_the_same() -> None:
    """A net with PEFT's own LoRA, its state through our dialect, and back into PEFT."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("conv_in", nn.Conv2d(2, 4, 3))
    net.add_module("proj", nn.Linear(4, 4))
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["conv_in", "proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, net)
    theirs = {f"unet.{k}": t for k, t in peft.get_peft_model_state_dict(model).items()}
    sites: list[ModulePath] = [("denoiser", "conv_in"), ("denoiser", "proj")]
    plain = Dialect(name="peft", prefix={"denoiser": "unet."}, tensor_names=PEFT.tensor_names, fold_alpha=True)
    read = adapter_files.read([plain], theirs, sites)
    for (_, path), leaves in read.items():
        # PEFT keeps alpha in its config, not among the tensors: here 8 / 2.
        torch.testing.assert_close(change(leaves) * 4, net.get_submodule(path).get_delta_weight("default").flatten(1))
        leaves["alpha"] *= 4
    written = {k.removeprefix("unet."): t for k, t in adapter_files.write(plain, read).items()}
    before = net.proj.get_delta_weight("default").clone()
    net.proj.scaling["default"] = net.conv_in.scaling["default"] = 1.0
    result = peft.set_peft_model_state_dict(model, written)
    assert not result.unexpected_keys
    torch.testing.assert_close(net.proj.get_delta_weight("default"), before)
