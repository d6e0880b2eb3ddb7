"""network_args of kohya's lora_sd3: which layers get which rank, and q, k and v with adapters of their own, as others read them."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import inserted, places, ranks
from adapted import plan_of as any_plan_of
from diffusers import StableDiffusion3Pipeline
from test_sd3_net import inputs
from tinies import sd3
from torch import Tensor, nn
from training import config

from sfumato.adapters import files as adapter_files
from sfumato.adapters.base import Adapter
from sfumato.adapters.insert import AdapterNetwork, choose, from_state
from sfumato.errors import UserError
from sfumato.families.sd3.facts import Completed, Options
from sfumato.families.sd3.family import FAMILY, dialects
from sfumato.families.sd3.net import MMDiT
from sfumato.formats.files import load as load_file
from sfumato.formats.files import save
from sfumato.models.base import Models
from sfumato.models.loading import load
from sfumato.train.trainables import Adapters, read_adapter

Keys = Callable[[str], dict[str, tuple[int, ...]]]
EMBEDDERS = {
    "context_embedder": 1,
    "t_embedder.mlp.0": 2,
    "t_embedder.mlp.2": 2,
    "x_embedder.proj": 3,
    "y_embedder.mlp.0": 5,
    "y_embedder.mlp.2": 5,
    "final_layer.adaLN_modulation.1": 6,
    "final_layer.linear": 7,
}

plan_of = partial(any_plan_of, "sd3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    files = sd3.write("3.5_medium", tmp_path_factory.mktemp("model"))
    return load(FAMILY, str(files.model), Options(**files.options), tokenizer=str(files.model.parent))


def predicted(models: Models) -> Tensor:
    with torch.no_grad():
        said: Tensor = models.denoiser(**inputs())
    return said


# --- which layers ---


def test_without_arguments_every_layer_of_every_block_has_the_common_rank(models: Models) -> None:
    found = ranks(models)
    # Five layers a stream, two more where a block attends twice; the last block's text has no projection and no two-layer net.
    assert len(found) == 3 * 10 + 2 * 2 - 3
    assert set(found.values()) == {4}
    assert all(path.startswith("joint_blocks.") for path in found)


def test_each_dim_is_the_rank_of_its_layers(models: Models) -> None:
    told = {"context_attn": 1, "context_mlp": 2, "context_mod": 3, "x_attn": 5, "x_mlp": 6, "x_mod": 7}
    found = ranks(models, *(f"{name}_dim={rank}" for name, rank in told.items()))
    assert len(found) == 31
    kinds = {"attn": "attn", "attn2": "attn", "mlp": "mlp", "adaLN_modulation": "mod"}
    for path, rank in found.items():
        _, _, stream, kind, *_ = path.split(".")
        assert rank == told[f"{stream.removesuffix('_block')}_{kinds[kind]}"], path


def test_a_dim_of_0_leaves_its_layers_out(models: Models) -> None:
    found = ranks(
        models,
        *(f"{name}_dim=0" for name in ("context_mlp", "context_mod", "x_mlp", "x_mod", "x_attn")),
        "context_attn_dim=2",
    )
    names = [f"joint_blocks.{i}.context_block.attn.{layer}" for i in range(3) for layer in ("qkv", "proj")]
    assert found == dict.fromkeys(names[:-1], 2)


def test_emb_dims_put_adapters_before_and_after_the_blocks(models: Models) -> None:
    """The patches' embedder is a convolution, which needs no rank of its own."""
    found = {
        path: rank
        for path, rank in ranks(models, "emb_dims=[1,2,3,5,6,7]").items()
        if not path.startswith("joint_blocks.")
    }
    assert found == EMBEDDERS
    some = ranks(models, "emb_dims=0,0,0,0,0,2", "train_block_indices=none")
    assert some == {"final_layer.linear": 2}


def test_adapters_on_the_embedders_act_and_come_back(models: Models, tmp_path: Path) -> None:
    held = inserted(models, plan_of("emb_dims=[1,2,3,5,6,7]", "train_block_indices=none"))
    wanted = predicted(models)
    for spelling in ("kohya", "comfy", "peft"):
        path = saved(models, held, tmp_path / f"{spelling}.safetensors", spelling)
        assert {site[1] for site in read_adapter(models, path)} == set(EMBEDDERS)
    held.remove()
    assert (predicted(models) - wanted).abs().max() > 0.01
    for spelling in ("kohya", "comfy", "peft"):
        again = from_state(models.nets(), read_adapter(models, tmp_path / f"{spelling}.safetensors")).eval()
        torch.testing.assert_close(predicted(models), wanted, atol=1e-5, rtol=1e-5)
        again.remove()


@pytest.mark.parametrize(
    ("told", "blocks"),
    [("all", {0, 1, 2}), ("1", {1}), ("0,2", {0, 2}), ("1-2", {1, 2}), ("0-1, 2", {0, 1, 2})],
)
def test_which_blocks(models: Models, told: str, blocks: set[int]) -> None:
    assert {int(path.split(".")[1]) for path in ranks(models, f"train_block_indices={told}")} == blocks


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("attention", r".*\.attn2?\..*"),
        ("mlp,modulation", r"joint_blocks\..*\.(mlp|adaLN_modulation)\..*"),
        ("context", r".*\.context_block\..*"),
        ("image", r".*\.x_block\..*"),
        ("embedders,output", r"(?!joint_blocks).*"),
    ],
)
def test_named_sets(models: Models, target: str, wanted: str) -> None:
    layers = (nn.Linear, nn.Conv2d)
    every = {path for path, layer in models.denoiser.named_modules() if isinstance(layer, layers)}
    found = ranks(models, f"target={target}")
    assert found == {path: 4 for path in every if re.fullmatch(wanted, path)} and found


def test_text_encoders_have_the_common_rank(models: Models) -> None:
    plan = plan_of("x_attn_dim=1", "train_block_indices=0", "split_qkv=True", "train_t5xxl=True")
    for name, layers in (("clip_l", 3 * 6), ("clip_g", 4 * 6), ("t5xxl", 2 * 7)):
        found = places(models, plan, name)
        assert len(found) == layers
        assert {(place.options.rank, place.options.pieces) for place in found} == {(4, ())}


def test_t5_is_trained_where_it_is_asked_for() -> None:
    assert FAMILY.trainable(Options(), None) == FAMILY.trainable(Options(), plan_of()) == {"clip_l", "clip_g"}
    asked = Options(train_t5xxl=True)
    assert FAMILY.trainable(asked, None) == FAMILY.trainable(asked, plan_of()) == {"clip_l", "clip_g", "t5xxl"}
    assert FAMILY.trainable(Options(), plan_of("train_t5xxl=True")) == {"clip_l", "clip_g", "t5xxl"}
    with pytest.raises(UserError, match="train_t5xxl: the model holds no T5; name its file with t5xxl"):
        FAMILY.trainable(Completed(version="medium", blocks=24, has_t5=False), plan_of("train_t5xxl=True"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("x_attn_dim=-1",), "x_attn_dim=-1: expected 0"),
        (
            ("emb_dims=[4,4]",),
            r"emb_dims=\[4,4\]: expected 6 ranks, those of context_embedder, t_embedder, x_embedder, y_embedder",
        ),
        (("emb_dims=many",), "emb_dims=many: expected 6 ranks"),
        (("train_block_indices=3-1",), "train_block_indices=3-1: expected all, none or numbers such as 0-5,8"),
        (("train_block_indices=a",), "train_block_indices=a: expected"),
        (("split_qkv=yes",), "split_qkv=yes: expected True or False"),
        (("x_atn_dim=4",), "'x_atn_dim' is not known.*x_attn_dim"),
    ],
)
def test_mistakes_are_told_before_a_weight_is_read(args: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        plan_of(*args)
    assert len(error.value.messages) == 1


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        plan_of("x_mlp_dim=-2", "train_block_indices=some", "emb_dims=1")
    assert len(error.value.messages) == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ("train_block_indices=0,3",),
            "train_block_indices=0,3: the model has 3 such blocks, numbered from 0, and none numbered 3",
        ),
        (("train_block_indices=none",), "no layer is left to put an adapter on"),
        (("conv_dim=4",), "conv_dim: does nothing"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(models: Models, args: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ranks(models, *args)


@pytest.mark.parametrize("arg", ["x_attn_dim=4", "emb_dims=[1,1,1,1,1,1]", "train_block_indices=0", "split_qkv=True"])
def test_what_shapes_adapters_is_refused_where_a_file_shapes_them(arg: str) -> None:
    with pytest.raises(
        UserError, match=f"{arg.partition('=')[0]}: .*dim_from_weights takes layers and ranks from network_weights"
    ) as error:
        plan_of(arg, dim_from_weights=True, network_weights="a.safetensors")
    assert len(error.value.messages) == 1
    assert plan_of("train_t5xxl=True", dim_from_weights=True, network_weights="a.safetensors").family.train_t5xxl


# --- q, k and v apart ---


def test_pieces_of_the_real_layers(keys: Keys) -> None:
    net, plan = MMDiT.of(keys("sd3.5_large.transformer")), plan_of("split_qkv=True")
    options = Completed(version="3.5-large", blocks=38, has_t5=True)
    found = choose(
        net, "denoiser", FAMILY.targets["denoiser"], plan, lambda place: FAMILY.target_layer(options, plan, place)
    )
    cut = {place.path: place.options.pieces for place in found if place.options.pieces}
    assert len(cut) == 38 * 2
    assert all(path.endswith(".attn.qkv") and pieces == (2432,) * 3 for path, pieces in cut.items())


def test_split_adapters_are_those_of_separate_layers(models: Models) -> None:
    """Each of q, k and v has a pair of its own at the common rank and strength."""
    held = inserted(models, plan_of("split_qkv=True", network_alpha=2.0))
    adapter: Any = held.by_path()["denoiser", "joint_blocks.1.x_block.attn2.qkv"]
    layer = models.denoiser.get_submodule("joint_blocks.1.x_block.attn2.qkv")
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2))
    plain = nn.functional.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    downs = adapter.lora_down.weight.chunk(3)
    change = torch.cat(
        [x @ down.T @ up.T * (2 / 4) for down, up in zip(downs, adapter.lora_up.blocks, strict=True)], -1
    )
    torch.testing.assert_close(layer(x), plain + change, atol=1e-5, rtol=1e-5)
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
    plan = plan_of("split_qkv=True", network_alpha=2.0)
    held = inserted(models, plan)
    wanted, path = predicted(models), saved(models, held, tmp_path / "split.safetensors", spelling)
    held.remove()
    state = read_adapter(models, path)
    leaves = state["denoiser", "joint_blocks.0.x_block.attn.qkv"]
    assert (leaves["lora_down.weight"].shape, leaves["lora_up.weight"].shape) == ((12, 128), (384, 12))
    # The common rule, alpha / rank * up @ down: what kohya's programs and ComfyUI do with the pair.
    scale = float(leaves["alpha"]) / 12
    assert scale == pytest.approx(2.0 / 4 if spelling != "peft" else 1.0)
    again = from_state(models.nets(), state).eval()
    torch.testing.assert_close(predicted(models), wanted, atol=1e-5, rtol=1e-5)
    again.remove()
    split = AdapterNetwork({"denoiser": places(models, plan)}, seed=1).eval()
    split.load(state)
    torch.testing.assert_close(predicted(models), wanted, atol=1e-5, rtol=1e-5)
    split.remove()
    assert (predicted(models) - wanted).abs().max() > 0.01


def test_a_peft_file_of_separate_layers_is_loaded_into_pieces(models: Models, tmp_path: Path) -> None:
    """As diffusers' own trainer writes it: a pair each for to_q, to_k and to_v."""
    g = torch.Generator().manual_seed(3)
    plan = plan_of(
        "split_qkv=True",
        "train_block_indices=0",
        *(f"{n}_dim=0" for n in ("context_attn", "context_mlp", "context_mod")),
    )
    wanted = {place.path: place for place in places(models, plan)}
    file = {}
    for path in ("attn", "attn2"):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            file[f"transformer.transformer_blocks.0.{path}.{name}.lora_A.weight"] = torch.randn(4, 128, generator=g)
            file[f"transformer.transformer_blocks.0.{path}.{name}.lora_B.weight"] = torch.randn(128, 4, generator=g)
    save(tmp_path / "peft.safetensors", file, {})
    state = read_adapter(models, tmp_path / "peft.safetensors")
    held = AdapterNetwork({"denoiser": [place for path, place in wanted.items() if ".attn" in path]}, seed=0).eval()
    held.load(state)
    for path in ("attn", "attn2"):
        adapter: Any = held.by_path()["denoiser", f"joint_blocks.0.x_block.{path}.qkv"]
        for block, name in zip(adapter.lora_up.blocks, ("to_q", "to_k", "to_v"), strict=True):
            assert torch.equal(block, file[f"transformer.transformer_blocks.0.{path}.{name}.lora_B.weight"])
    pieces = predicted(models)
    held.remove()
    fused = from_state(models.nets(), state).eval()
    torch.testing.assert_close(predicted(models), pieces, atol=1e-5, rtol=1e-5)
    fused.remove()


def test_a_file_that_is_not_of_pieces_is_refused(models: Models, tmp_path: Path) -> None:
    whole = inserted(models, plan_of(rank=12))
    state = read_adapter(models, saved(models, whole, tmp_path / "whole.safetensors"))
    whole.remove()
    plan = plan_of("split_qkv=True")
    split = AdapterNetwork({"denoiser": places(models, plan)}, seed=0)
    with pytest.raises(UserError, match="leave split_qkv out"):
        split.load(state)
    split.remove()


def test_another_kind_of_adapter_cannot_be_cut(models: Models) -> None:
    with pytest.raises(UserError, match="split_qkv: is for LoRA, not for Adapter; leave it out"):
        places(models, replace(plan_of("split_qkv=True"), kind=Adapter))


# --- diffusers ---


def theirs(file: Path | None) -> list[Tensor]:
    """What diffusers' transformer and text encoders say with an adapter file that its pipeline loads."""
    parts = dict(sd3.pipeline("3.5_medium").components)
    changed = ("transformer", "text_encoder", "text_encoder_2")
    pipe = StableDiffusion3Pipeline(**{**parts, **{name: deepcopy(parts[name]) for name in changed}})
    if file is not None:
        pipe.load_lora_weights(str(file))
    told = inputs()
    with torch.no_grad():
        said = pipe.transformer(told["x"], told["context"], told["y"], told["t"]).sample
        return [said, *sd3.told(pipe, ["a cat"])]


def ours(models: Models) -> list[Tensor]:
    with torch.no_grad():
        cond = models.encode(models.tokenize(["a cat"]))
    clips = nn.functional.pad(torch.cat([cond["clip_l"], cond["clip_g"]], -1), (0, sd3.CONTEXT - sd3.POOLED))
    return [
        predicted(models),
        torch.cat([clips, cond["t5"]], 1),
        torch.cat([cond["clip_l_pooled"], cond["clip_g_pooled"]], -1),
    ]


@pytest.mark.parametrize(
    "args", [(), ("split_qkv=True",), ("emb_dims=[2,2,2,2,2,2]",)], ids=["plain", "split", "embedders"]
)
def test_an_adapter_acts_the_same_in_diffusers(models: Models, tmp_path: Path, args: tuple[str, ...]) -> None:
    """Both CLIPs included, through the pipeline's own loader."""
    held = inserted(models, plan_of(*args, network_alpha=3.0), "denoiser", "clip_l", "clip_g")
    wanted, path = ours(models), saved(models, held, tmp_path / "adapter.safetensors", "peft")
    held.remove()
    for mine, own, before in zip(wanted, theirs(path), theirs(None), strict=True):
        torch.testing.assert_close(own, mine, atol=5e-5, rtol=5e-5)
        assert (own - before).abs().max() > 1e-2


def test_adapters_on_a_t5_that_is_not_trained_stay_in_the_result(models: Models, tmp_path: Path) -> None:
    """Without train_t5xxl, `lora_te3_*` of network_weights is kept, and acts, in place of being lost."""
    held = inserted(models, plan_of(), "denoiser", "t5xxl")
    path = saved(models, held, tmp_path / "a.safetensors")
    before = dict(load_file(path))
    held.remove()
    told = config(network_weights=str(path), dim_from_weights=True, family=models.options)
    trainable = Adapters(models, told, plan_of())
    assert "t5xxl" not in trainable.trained and any("t5xxl is not trained" in notice for notice in trainable.notices)
    trainable.save(tmp_path / "b.safetensors", {})
    after = load_file(tmp_path / "b.safetensors")
    trainable.remove()
    assert any(name.startswith("lora_te3_") for name in before)
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
