"""network_args of kohya's lora_flux: which layers get which rank, and q, k and v with adapters of their own, as others read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import inserted, places, ranks
from adapted import plan_of as any_plan_of
from diffusers import FluxPipeline
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from flux_checks import meta
from test_flux_net import inputs
from tinies import flux
from torch import Tensor, nn

from sfumato.adapters import files as adapter_files
from sfumato.adapters.insert import AdapterNetwork, TargetLayer, choose, from_state
from sfumato.errors import UserError
from sfumato.families.flux.facts import Completed, Options
from sfumato.families.flux.family import FAMILY, dialects
from sfumato.families.flux.net import Flux
from sfumato.families.flux.network_args import target_layer
from sfumato.formats import dialect
from sfumato.formats.files import save
from sfumato.models.base import Models
from sfumato.models.loading import load
from sfumato.models.meta_init import shapes
from sfumato.train.trainables import read_adapter

Keys = Callable[[str], dict[str, tuple[int, ...]]]
ATTENTION = ("img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj")

plan_of = partial(any_plan_of, "flux")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    files = flux.write(True, tmp_path_factory.mktemp("model"))
    return load(FAMILY, str(files.model), Options(**files.options), vae=files.vae)


def predicted(models: Models) -> Tensor:
    with torch.no_grad():
        said: Tensor = models.denoiser(**inputs())
    return said


# --- which layers ---


def test_without_arguments_every_layer_of_every_block_has_the_common_rank(models: Models) -> None:
    found = ranks(models)
    assert set(found.values()) == {4}
    assert len(found) == 2 * 10 + 3 * 3
    assert all(path.startswith(("double_blocks.", "single_blocks.")) for path in found)


def test_each_dim_is_the_rank_of_its_layers(models: Models) -> None:
    told = {
        "img_attn": 1,
        "txt_attn": 2,
        "img_mlp": 3,
        "txt_mlp": 5,
        "img_mod": 6,
        "txt_mod": 7,
        "single": 8,
        "single_mod": 9,
    }
    found = ranks(models, *(f"{name}_dim={rank}" for name, rank in told.items()))
    assert len(found) == 29
    for path, rank in found.items():
        kind = path.split(".")[2]
        assert rank == told[kind if path.startswith("double") else {"modulation": "single_mod"}.get(kind, "single")], (
            path
        )


def test_a_dim_of_0_leaves_its_layers_out(models: Models) -> None:
    found = ranks(
        models,
        "img_mod_dim=0",
        "txt_mod_dim=0",
        "single_mod_dim=0",
        "img_mlp_dim=0",
        "txt_mlp_dim=0",
        "single_dim=0",
        "img_attn_dim=2",
    )
    assert found == {
        f"double_blocks.{i}.{name}": 2 if name.startswith("img") else 4 for i in range(2) for name in ATTENTION
    }


def test_in_dims_put_adapters_on_what_stands_before_the_blocks(models: Models) -> None:
    found = {path: rank for path, rank in ranks(models, "in_dims=[1,2,3,5,0]").items() if "blocks" not in path}
    two = {
        f"{name}.{layer}": rank
        for name, rank in (("time_in", 2), ("vector_in", 3), ("guidance_in", 5))
        for layer in ("in_layer", "out_layer")
    }
    assert found == {"img_in": 1, **two}
    plan = plan_of("in_dims=4,4,4,4,4")
    written = adapter_files.write(
        dialects(models)["kohya"], AdapterNetwork({"denoiser": places(models, plan)}, seed=0).state()
    )
    assert {
        "lora_unet_img_in.alpha",
        "lora_unet_guidance_in_out_layer.alpha",
        "lora_unet_txt_in.lora_up.weight",
    } <= written.keys()


@pytest.mark.parametrize(
    ("args", "double", "single"),
    [
        (("train_blocks=all",), {0, 1}, {0, 1, 2}),
        (("train_blocks=double",), {0, 1}, set()),
        (("train_blocks=single",), set(), {0, 1, 2}),
        (("train_double_block_indices=1", "train_single_block_indices=0,2"), {1}, {0, 2}),
        (("train_double_block_indices=none", "train_single_block_indices=1-2"), set(), {1, 2}),
        (("train_double_block_indices=all", "train_single_block_indices=none"), {0, 1}, set()),
        (("train_blocks=single", "train_single_block_indices=0-1"), set(), {0, 1}),
    ],
)
def test_which_blocks(models: Models, args: tuple[str, ...], double: set[int], single: set[int]) -> None:
    found = ranks(models, *args)
    blocks = {(path.split(".")[0], int(path.split(".")[1])) for path in found}
    assert blocks == {("double_blocks", i) for i in double} | {("single_blocks", i) for i in single}


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("double_blocks", r"double_blocks\..*"),
        ("single_blocks", r"single_blocks\..*"),
        ("attention", r"double_blocks\.\d\.(img|txt)_attn\..*|single_blocks\.\d\.linear[12]"),
        ("modulation", r".*blocks.*(_mod|modulation)\..*"),
        ("denoiser.mlp", r"double_blocks\.\d\.(img|txt)_mlp\..*|single_blocks\.\d\.linear[12]"),
        ("inputs", r"(img|txt)_in|(time|vector|guidance)_in\.(in|out)_layer"),
    ],
)
def test_named_sets(models: Models, target: str, wanted: str) -> None:
    every = {path for path, layer in models.denoiser.named_modules() if isinstance(layer, nn.Linear)}
    found = ranks(models, f"target={target}")
    assert found == {path: 4 for path in every if re.fullmatch(wanted, path)} and found


def test_a_rank_by_pattern_goes_before_the_familys_own_and_keeps_the_pieces(models: Models) -> None:
    args = ("img_attn_dim=0", "train_single_block_indices=none", "split_qkv=True")
    found = {
        p.path: (p.options.rank, bool(p.options.pieces))
        for p in places(
            models, plan_of(*args, "network_reg_dims=double_blocks_1_img_attn=3,.*single_blocks.0.linear1=2")
        )
    }
    assert found.keys() & {f"double_blocks.0.{name}" for name in ATTENTION} == {
        "double_blocks.0.txt_attn.qkv",
        "double_blocks.0.txt_attn.proj",
    }
    assert found["double_blocks.1.img_attn.qkv"] == (3, True) and found["double_blocks.1.img_attn.proj"] == (3, False)
    assert [(path, *each) for path, each in found.items() if "single" in path] == [("single_blocks.0.linear1", 2, True)]


@pytest.mark.parametrize("family", ["flux", "chroma"])
def test_conv_dim_is_refused_where_no_layer_is_a_convolution(models: Models, family: str) -> None:
    with pytest.raises(UserError, match="conv_dim: does nothing, as none of the layers that get adapters is a convol"):
        places(models, any_plan_of(family, "conv_dim=4"))


def test_text_encoders_have_the_common_rank(models: Models) -> None:
    plan = plan_of("img_attn_dim=1", "train_blocks=double", "split_qkv=True", "train_t5xxl=True")
    for name, layers in (("clip_l", 3 * 6), ("t5xxl", 3 * 7)):
        found = places(models, plan, name)
        assert len(found) == layers
        assert {(place.options.rank, place.options.pieces) for place in found} == {(4, ())}


def test_t5_is_trained_where_it_is_asked_for() -> None:
    options = Options()
    assert FAMILY.trainable(options, plan_of()) == {"clip_l"}
    assert FAMILY.trainable(options, plan_of("train_t5xxl=True")) == {"clip_l", "t5xxl"}
    assert (
        FAMILY.trainable(Options(train_t5xxl=True), None)
        == FAMILY.trainable(Options(train_t5xxl=True), plan_of())
        == {"clip_l", "t5xxl"}
    )


def test_diffusers_names_have_no_place_for_t5(models: Models) -> None:
    """diffusers loads none; so it is told before the training: `Adapters` writes once at the start."""
    site = ("t5xxl", "encoder.block.0.layer.0.SelfAttention.q")
    assert dialects(models)["kohya"].names(site)[0] == ("lora_te3_encoder_block_0_layer_0_SelfAttention_q",)
    assert dialects(models)["comfy"].names(site)[0] == (f"text_encoders.t5xxl.transformer.{site[1]}",)
    with pytest.raises(UserError, match="peft names have no place for 't5xxl'"):
        dialects(models)["peft"].names(site)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("img_attn_dim=-1",), "img_attn_dim=-1: expected 0"),
        (
            ("in_dims=[4,4]",),
            r"in_dims=\[4,4\]: expected 5 ranks, those of img_in, time_in, vector_in, guidance_in, txt_in",
        ),
        (("in_dims=many",), "in_dims=many: expected 5 ranks"),
        (("train_blocks=triple",), "train_blocks=triple: expected all, double or single"),
        (
            ("train_double_block_indices=3-1",),
            "train_double_block_indices=3-1: expected all, none or numbers such as 0-5,8",
        ),
        (("train_single_block_indices=a",), "train_single_block_indices=a: expected"),
        (
            ("train_blocks=single", "train_double_block_indices=0"),
            "train_double_block_indices: does nothing with train_blocks=single",
        ),
        (("split_qkv=yes",), "split_qkv=yes: expected True or False"),
        (("img_atn_dim=4",), "'img_atn_dim' is not known.*img_attn_dim"),
    ],
)
def test_mistakes_are_told_before_a_weight_is_read(args: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        plan_of(*args)
    assert len(error.value.messages) == 1


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        plan_of("single_dim=-2", "train_blocks=none", "in_dims=1")
    assert len(error.value.messages) == 3


@pytest.mark.parametrize(("kind", "number", "blocks"), [("double", 2, 2), ("single", 40, 3)])
def test_numbers_beyond_the_models_blocks_are_an_error(models: Models, kind: str, number: int, blocks: int) -> None:
    with pytest.raises(
        UserError,
        match=f"train_{kind}_block_indices=0,{number}: the model has {blocks} such blocks.* none numbered {number}",
    ):
        ranks(models, f"train_{kind}_block_indices=0,{number}")


def test_schnell_has_no_guidance_to_put_an_adapter_on(models: Models) -> None:
    net, plan = models.denoiser, plan_of("in_dims=[4,4,4,4,4]")
    schnell = Completed(guided=False, double_blocks=2, single_blocks=3)
    with pytest.raises(UserError, match="takes no guidance, so the fourth rank must be 0"):
        choose(net, "denoiser", FAMILY.targets["denoiser"], plan, lambda target: target_layer(schnell, plan, target))


# --- q, k and v apart ---


def test_pieces_of_the_real_layers(keys: Keys) -> None:
    table = keys("flux_dev.transformer")
    plan = plan_of("split_qkv=True")
    options = Completed(guided=True, double_blocks=19, single_blocks=38)
    found = {
        place.path: place.options.pieces
        for place in choose(
            Flux.of(table), "denoiser", FAMILY.targets["denoiser"], plan, lambda p: target_layer(options, plan, p)
        )
    }
    cut = {path: pieces for path, pieces in found.items() if pieces}
    assert len(cut) == 19 * 2 + 38
    for path, pieces in cut.items():
        assert (
            pieces == (3072,) * 3
            if path.endswith("attn.qkv")
            else path.endswith("linear1") and pieces == (3072, 3072, 3072, 12288)
        )


def test_split_adapters_are_those_of_separate_layers(models: Models) -> None:
    """Of a fused layer: each piece has a pair of its own at the common rank and strength."""
    held = inserted(models, plan_of("split_qkv=True", network_alpha=2.0))
    adapter: Any = held.by_path()["denoiser", "single_blocks.1.linear1"]
    net_layer = models.denoiser.get_submodule("single_blocks.1.linear1")
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    plain = nn.functional.linear(x, net_layer.weight, net_layer.bias)  # type: ignore[arg-type]
    downs = adapter.lora_down.weight.chunk(4)
    assert [len(up) for up in adapter.lora_up.blocks] == [64, 64, 64, 256]
    change = torch.cat(
        [x @ down.T @ up.T * (2 / 4) for down, up in zip(downs, adapter.lora_up.blocks, strict=True)], -1
    )
    torch.testing.assert_close(net_layer(x), plain + change, atol=1e-5, rtol=1e-5)
    held.remove()


def saved(models: Models, held: AdapterNetwork, path: Path, spelling: str = "kohya") -> Path:
    save(
        path,
        {name: t.contiguous() for name, t in adapter_files.write(dialects(models)[spelling], held.state()).items()},
        {},
    )
    return path


@pytest.mark.parametrize("spelling", ["kohya", "comfy", "peft"])
def test_saved_as_one_pair_it_acts_the_same_at_strength_1(models: Models, tmp_path: Path, spelling: str) -> None:
    """alpha grows with the rank, so that programs that know nothing of pieces scale it as it was trained."""
    held = inserted(models, plan_of("split_qkv=True", network_alpha=2.0))
    wanted, path = predicted(models), saved(models, held, tmp_path / "split.safetensors", spelling)
    held.remove()
    state = read_adapter(models, path)
    assert state["denoiser", "double_blocks.0.img_attn.qkv"]["lora_down.weight"].shape[0] == 12
    again = from_state(models.nets(), state).eval()
    torch.testing.assert_close(predicted(models), wanted, atol=1e-5, rtol=1e-5)
    again.remove()
    split = AdapterNetwork({"denoiser": places(models, plan_of("split_qkv=True", network_alpha=2.0))}, seed=1).eval()
    split.load(state)
    torch.testing.assert_close(predicted(models), wanted, atol=1e-5, rtol=1e-5)
    split.remove()
    assert (predicted(models) - wanted).abs().max() > 0.01


def test_a_file_that_is_not_of_pieces_is_refused(models: Models, tmp_path: Path) -> None:
    held = inserted(models, plan_of(rank=12))
    state = read_adapter(models, saved(models, held, tmp_path / "whole.safetensors"))
    held.remove()
    split = AdapterNetwork({"denoiser": places(models, plan_of("split_qkv=True"))}, seed=0)
    with pytest.raises(UserError, match="leave split_qkv out"):
        split.load(state)
    split.remove()


def test_another_kind_of_adapter_cannot_be_cut(models: Models) -> None:
    from dataclasses import replace

    from sfumato.adapters.base import Adapter

    plan = replace(plan_of("split_qkv=True"), kind=Adapter)
    with pytest.raises(UserError, match="split_qkv: is for LoRA, not for Adapter; leave it out"):
        places(models, plan)


# --- diffusers ---


def theirs(pipe: Any, adapter: Path | Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    """What diffusers' transformer and text encoder say with an adapter file that its pipeline loads."""
    parts = dict(pipe.components)
    tied_keys = {name: deepcopy(parts[name]) for name in ("transformer", "text_encoder")}
    copy = FluxPipeline(**{**parts, **tied_keys})
    if adapter is not None:
        copy.load_lora_weights(str(adapter) if isinstance(adapter, Path) else dict(adapter))
    told = inputs()
    b, c, h, w = told["x"].shape
    with torch.no_grad():
        said = copy.transformer(
            hidden_states=copy._pack_latents(told["x"], b, c, h, w),
            encoder_hidden_states=told["context"],
            pooled_projections=told["y"],
            timestep=told["t"],
            img_ids=copy._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(told["context"].shape[1], 3),
            guidance=told["guidance"],
        ).sample
        pooled: Tensor = copy.encode_prompt("a cat", None, device="cpu")[1]
    unpacked: Tensor = copy._unpack_latents(said, h * 8, w * 8, 8)
    return unpacked, pooled


def pooled(models: Models) -> Tensor:
    with torch.no_grad():
        return models.encode(models.tokenize(["a cat"]))["pooled"]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("spelling", "more"), [("peft", ()), ("kohya", ("train_blocks=double",))])
def test_an_adapter_acts_the_same_in_diffusers(
    models: Models, tmp_path: Path, spelling: str, more: tuple[str, ...], split: bool
) -> None:
    """Text encoder included. diffusers knows kohya's names of the single blocks at the real size alone: see the next test."""
    held = inserted(models, plan_of(f"split_qkv={split}", *more, network_alpha=3.0), "denoiser", "clip_l")
    wanted, path = (predicted(models), pooled(models)), saved(models, held, tmp_path / "adapter.safetensors", spelling)
    held.remove()
    found, plain = theirs(flux.pipeline(), path), theirs(flux.pipeline(), None)
    for mine, own, before in zip(wanted, found, plain, strict=True):
        torch.testing.assert_close(own, mine, atol=2e-5, rtol=2e-5)
        assert (own - before).abs().max() > 1e-2


@pytest.mark.parametrize("split", [False, True])
def test_a_single_block_of_the_real_size_in_diffusers(split: bool) -> None:
    width, path = 3072, "single_blocks.7.linear1"
    big = nn.Linear(width, 7 * width, bias=False, device="meta")
    big.weight = nn.Parameter(torch.zeros(1).expand(7 * width, width), requires_grad=False)  # takes no room
    plan = plan_of(f"split_qkv={split}", rank=2, network_alpha=1.0)
    options = Completed(guided=True, double_blocks=19, single_blocks=38)
    place = target_layer(options, plan, TargetLayer(path, big, plan.options(conv=False), plan.kind))
    assert place is not None
    held = AdapterNetwork({"denoiser": [place]}, seed=0)
    g = torch.Generator().manual_seed(1)
    for name, p in held.named_parameters():
        if "lora_up" in name:
            p.data = torch.randn(p.shape, generator=g)
    adapter_dialects = dialect.Dialect(name="kohya", prefix={"denoiser": "lora_unet_"}, separator="_")
    converted = _convert_kohya_flux_lora_to_diffusers(
        {k: t.clone() for k, t in adapter_files.write(adapter_dialects, held.state()).items()}
    )
    block = "transformer.single_transformer_blocks.7"
    names = [f"{block}.attn.to_{n}" for n in "qkv"] + [f"{block}.proj_mlp"]
    x = torch.randn(3, width, generator=g)
    said = torch.cat([x @ converted[f"{n}.lora_A.weight"].T @ converted[f"{n}.lora_B.weight"].T for n in names], -1)
    with torch.no_grad():
        torch.testing.assert_close(said, big(x), atol=1e-4, rtol=1e-4)
    assert converted[f"{names[0]}.lora_A.weight"].shape[0] == 2


def test_files_of_peft_with_q_k_and_v_apart_are_loaded_into_split_layers(models: Models, tmp_path: Path) -> None:
    """As ai-toolkit and diffusers' own scripts write them."""
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for name, part in flux.transformer().named_modules():
        if isinstance(part, nn.Linear) and "blocks" in name:
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, part.in_features, generator=g) / 8
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(part.out_features, 4, generator=g) / 2
    save(tmp_path / "peft.safetensors", tensors, {})
    plan = plan_of("split_qkv=True", network_alpha=1.0)
    split = AdapterNetwork({"denoiser": places(models, plan)}, seed=0).eval()
    split.load(read_adapter(models, tmp_path / "peft.safetensors"))
    found = predicted(models)
    split.remove()
    torch.testing.assert_close(found, theirs(flux.pipeline(), tmp_path / "peft.safetensors")[0], atol=2e-5, rtol=2e-5)
    assert (found - predicted(models)).abs().max() > 0.1
    back = adapter_files.write(dialects(models)["peft"], split.state())
    assert set(back) == set(tensors)


def test_the_table_of_sd_scripts_holds_the_text_encoders_too(keys: Keys) -> None:
    """At full size, on the meta device: every adapter of every part has kohya's name and shape."""
    from sfumato.models.encoders.clip import clip_net
    from sfumato.models.encoders.t5 import t5_net

    table = keys("flux_dev.transformer")
    t5 = t5_net({name: shape for name, shape in keys("t5xxl.hf").items() if name != "encoder.embed_tokens.weight"})
    nets = {"denoiser": Flux.of(table), "clip_l": clip_net(keys("clip_l.hf"), "quick_gelu"), "t5xxl": t5}
    plan = plan_of("train_t5xxl=True", network_alpha=1.0)
    options = Completed(guided=True, double_blocks=19, single_blocks=38)
    held = AdapterNetwork(
        {
            n: choose(net, n, FAMILY.targets[n], plan, lambda p: target_layer(options, plan, p))
            for n, net in nets.items()
        },
        seed=0,
    )
    full = Models(FAMILY, options, nets["denoiser"], {"clip_l": nets["clip_l"], "t5xxl": nets["t5xxl"]}, {}, None)
    assert shapes(adapter_files.write(dialects(full)["kohya"], held.state())) == keys("adapter.flux.lora")
    # And back, from the names alone.
    by_path = [
        (n, path) for n, net in nets.items() for path, part in net.named_modules() if isinstance(part, nn.Linear)
    ]
    file = {n: torch.tensor(1.0) if n.endswith("alpha") else t for n, t in meta(keys("adapter.flux.lora")).items()}
    back = adapter_files.read(dialects(full).values(), file, by_path)
    assert back.keys() == held.state().keys()
