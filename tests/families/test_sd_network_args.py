"""network_args of models with a U-Net: ranks, alphas and rates by block as kohya counts them, and named sets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from adapted import places, plan_of, ranks
from training import config

from sfumato import families
from sfumato.adapters.insert import choose
from sfumato.errors import UserError
from sfumato.families.sd.facts import Options
from sfumato.families.sd.network_args import UNET_BLOCKS, block_number, weights
from sfumato.families.sdxl import network_args as xl
from sfumato.families.sdxl.family import FAMILY as SDXL
from sfumato.families.sdxl.net import UNet
from sfumato.formats import files
from sfumato.models.base import Models
from sfumato.models.loading import load
from sfumato.optim.groups import Group
from sfumato.train.trainables import Adapters

Keys = Callable[[str], dict[str, tuple[int, ...]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return load(families.family("sd"), str(tiny.tiny_sd1(tmp_path_factory.mktemp("model"))), Options())


def adapters(models: Models, *args: str, **more: Any) -> Adapters:
    """What would be trained, put in and taken out again."""
    made = Adapters(
        models,
        config(family=models.options, learning_rate=1e-3, network_train_unet_only=True, **more),
        plan_of(
            "sd",
            *args,
            **{name: more[name] for name in ("dim_from_weights", "network_module", "network_weights") if name in more},
        ),
    )
    made.remove()
    return made


def by_rate(groups: list[Group]) -> dict[float, int]:
    return {round(group.lr, 9): len(group.parameters) for group in groups}


# --- blocks ---


def test_every_layer_is_in_the_block_that_sd_scripts_counts(keys: Keys) -> None:
    """Its rule for 1.x, on the names of its files: 3 a level, the middle is 12, the way up begins at 13."""
    models = {name for name in keys("adapter.sd1.locon") if name.startswith("lora_unet")}
    from sfumato.families.sd.names import unet_keys

    table = unet_keys(keys("sd1.unet.diffusers"))
    native = {
        "lora_unet_" + table.match(name, native=True).foreign()[0].replace(".", "_"): name  # type: ignore[union-attr]
        for name in {k.rpartition(".")[0] for k in table.to_native(dict.fromkeys(keys("sd1.unet.diffusers"), None))}
    }
    found = {name: block_number(UNET_BLOCKS, native[name]) for name in {n.split(".")[0] for n in models}}
    for name, number in found.items():
        if place := re.match(
            r"lora_unet_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_", name
        ):
            at = 3 * int(place[2]) + (2 if "samplers" in place[3] else int(place[4]))
            assert number == (1 if place[1] == "down" else 13) + at, name
        else:
            assert "mid_block" in name and number == 12
    assert set(found.values()) == set(range(1, 25))


def test_ranks_and_alphas_by_block(models: Models) -> None:
    dims = ",".join(str(i % 5) for i in range(25))
    found = {p.path: p.options for p in places(models, plan_of("sd", f"block_dims={dims}", f"block_alphas={dims}"))}
    for path, options in found.items():
        number = block_number(UNET_BLOCKS, path)
        assert number is not None and options.rank == options.alpha == number % 5, path
    whole = ranks(models)
    assert whole.keys() - found.keys() == {path for path in whole if block_number(UNET_BLOCKS, path) % 5 == 0}  # type: ignore[operator]
    text = places(models, plan_of("sd", f"block_dims={dims}"), "clip_l")
    assert {p.options.rank for p in text} == {4}


def test_convolutions_have_ranks_by_block_of_their_own(models: Models) -> None:
    dims = ",".join(["2"] * 24 + ["0"])
    found = {
        p.path: (p.options.rank, p.options.alpha, p.is_large)
        for p in places(models, plan_of("sd", f"conv_block_dims={dims}"))
    }
    assert {rank for rank, _, large in found.values() if large} == {2}
    assert {rank for rank, _, large in found.values() if not large} == {4}
    alphas = places(models, plan_of("sd", f"conv_block_dims={dims}", f"conv_block_alphas={dims.replace('2', '3')}"))
    assert {p.options.alpha for p in alphas if p.is_large} == {3.0}
    assert {
        p.options.alpha for p in places(models, plan_of("sd", f"conv_block_dims={dims}", "conv_alpha=7")) if p.is_large
    } == {7.0}


def test_which_blocks(models: Models) -> None:
    found = {block_number(UNET_BLOCKS, path) for path in ranks(models, "train_block_indices=1-2,12")}
    assert found <= {1, 2, 12} and 12 in found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1,0.5,,2", (1, 0.5, 0, 2)),
        ("zeros+0.5", (0.5,) * 4),
        ("linear", (0, 1 / 3, 2 / 3, 1)),
        ("reverse_linear+1", (2, 5 / 3, 4 / 3, 1)),
        ("sine", (0, 0.5, math.sqrt(3) / 2, 1)),
        ("cosine+.25", (1.25, math.sqrt(3) / 2 + 0.25, 0.75, 0.25)),
    ],
)
def test_weights_of_blocks(text: str, wanted: tuple[float, ...]) -> None:
    assert weights(text, 4) == pytest.approx(wanted, abs=1e-12)


def test_rates_by_block_are_groups_of_the_optimizer(models: Models) -> None:
    down = ",".join("0.5" if i < 4 else "0.05" for i in range(12))
    made = adapters(
        models, f"down_lr_weight={down}", "mid_lr_weight=2", "block_lr_zero_threshold=0.1", "loraplus_lr_ratio=4"
    )
    numbers = {path[1]: block_number(UNET_BLOCKS, path[1]) for path in made.network.by_path()}
    wanted: dict[float, int] = {}
    for number in numbers.values():
        rate = 5e-4 if number in range(4) else 2e-3 if number == 12 else 1e-3
        wanted[rate] = wanted.get(rate, 0) + 2
    assert by_rate(made.groups()) == wanted and len(wanted) == 3
    assert not set(numbers.values()) & set(range(4, 12)), "a factor of 0 leaves a block out"
    assert all(len(group.plus) == len(group.parameters) // 2 for group in made.groups())
    assert [group.name for group in made.groups()] == ["denoiser 0", "denoiser 1", "denoiser 2"]


def test_rates_act_on_layers_of_a_file_as_well(models: Models, tmp_path: Path) -> None:
    whole = adapters(models)
    whole.save(tmp_path / "a.safetensors", {})
    more = {"network_weights": str(tmp_path / "a.safetensors"), "dim_from_weights": True}
    made = adapters(models, "mid_lr_weight=0", "up_lr_weight=zeros+0.5", **more)
    assert made.network.by_path().keys() == whole.network.by_path().keys()
    assert set(by_rate(made.groups())) == {1e-3, 5e-4}
    still = {path for path, a in made.network.by_path().items() if not any(p.requires_grad for p in a.parameters())}
    assert {path[1].partition(".")[0] for path in still} == {"middle_block"}


def test_what_a_kind_does_not_train_stays_out_of_the_groups(models: Models) -> None:
    made = adapters(models, network_module="lora_fa")
    assert by_rate(made.groups()) == {1e-3: len(made.network.by_path())}
    assert {name.split("|")[-1] for name, p in made.weights().items() if p.requires_grad} == {"lora_up.weight"}


@pytest.mark.parametrize(
    ("family", "args", "says"),
    [
        ("sd", ("block_dims=1,2",), "block_dims=1,2: expected 25 numbers, found 2"),
        ("sdxl", ("block_dims=" + ",".join("4" * 25),), "expected 23 numbers, found 25"),
        ("sd", ("block_dims=" + ",".join("a" * 25),), "expected whole numbers with commas"),
        ("sd", ("down_lr_weight=cosin",), "down_lr_weight=cosin: expected numbers .* one of cosine, sine"),
        ("sd", ("down_lr_weight=1,2",), "down_lr_weight=1,2: expected 12 numbers, found 2"),
        ("sdxl", ("mid_lr_weight=1",), "mid_lr_weight=1: expected 3 numbers, found 1"),
        ("sd", ("block_lr_zero_threshold=0.1",), "does nothing without down_lr_weight, mid_lr_weight, up_lr_weight"),
        ("sd", ("conv_block_alphas=" + ",".join("4" * 25),), "conv_block_alphas: does nothing without conv_block_dims"),
    ],
)
def test_mistakes_are_told_before_a_weight_is_read(family: str, args: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        plan_of(family, *args)
    assert len(error.value.messages) == 1


def test_stable_diffusion_xl_has_23_blocks() -> None:
    plan = plan_of("sdxl", "block_dims=" + ",".join(map(str, range(23))), "up_lr_weight=linear")
    args = plan.family
    assert [args.rate_factor(f"output_blocks.{i}.1.proj_in") for i in range(9)] == pytest.approx(
        [i / 8 for i in range(9)]
    )
    assert args.rate_factor("input_blocks.0.0") == 1 and args.rate_factor("text_model.encoder.layers.0.mlp.fc1") == 1
    assert {block_number(xl.UNET_BLOCKS, path) for path in ("time_embed.0", "label_emb.0.0")} == {0}


# --- sets ---


def test_attention_is_where_kohyas_oft_is(keys: Keys) -> None:
    """sd-scripts' networks.oft on Stable Diffusion XL: the class CrossAttention alone."""
    wanted = {name.split(".")[0].removeprefix("oft_unet_") for name in keys("adapter.sdxl.oft")}
    found = choose(
        UNet.of(keys("sdxl.unet")), "denoiser", SDXL.targets["denoiser"], plan_of("sdxl", "target=attention")
    )
    assert {place.path.replace(".", "_") for place in found} == wanted


@pytest.mark.parametrize(
    ("target", "denoiser", "text"),
    [
        ("attention", r".*\.attn[12]\..*", r".*\.self_attn\..*"),
        ("mlp", r".*\.ff\..*", r".*\.mlp\..*"),
        ("denoiser.cross_attention,clip_l.mlp", r".*\.attn2\..*", r".*\.mlp\..*"),
        ("text_encoders", None, ".*"),
        ("denoiser", r".*(transformer_blocks|proj_in|proj_out).*", None),
        ("clip_l.attention", None, r".*\.self_attn\..*"),
        ("embedders", r"time_embed\.[02]", None),
        ("all", ".*", ".*"),
    ],
)
def test_named_sets(models: Models, target: str, denoiser: str | None, text: str | None) -> None:
    made = adapters_of_both(models, f"target={target}")
    for component, pattern in (("denoiser", denoiser), ("clip_l", text)):
        paths = [path for name, path in made.network.by_path() if name == component]
        assert (component in made.trained) == (pattern is not None) == bool(paths)
        assert all(re.fullmatch(pattern or "", path) for path in paths)


def adapters_of_both(models: Models, *args: str) -> Adapters:
    made = Adapters(models, config(family=models.options, learning_rate=1e-3), plan_of("sd", *args))
    made.remove()
    return made


def test_convolutions_of_named_sets_have_the_common_rank_or_their_own(models: Models) -> None:
    for args, large in (((), 4), (("conv_dim=2",), 2), (("conv_dim=0",), None)):
        found = places(models, plan_of("sd", "target=resnets", *args))
        assert {p.options.rank for p in found if p.is_large} == ({large} if large else set())
        assert {p.options.rank for p in found if not p.is_large} == {4}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("target=atention",), "target=atention: is not known here; did you mean 'attention'"),
        (("target=clip_l.embedders",), r"target=clip_l\.embedders: is not known here"),
        (("target=attention", "conv_dim=4"), "conv_dim: does nothing"),
        (("exclude_patterns=['.*attn3.*']",), r"exclude_patterns: '\.\*attn3\.\*' is the whole of no layer's path"),
        (("include_patterns=['attn1']",), "include_patterns: 'attn1' is the whole of no layer's path"),
        (("network_reg_dims=attn3=4",), "network_reg_...: 'attn3' matches no layer"),
        (("target=none",), "no layer is left to put an adapter on"),
    ],
)
def test_what_means_no_layer_is_refused(models: Models, args: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        adapters_of_both(models, *args)


def test_conv_dim_without_the_denoiser_is_refused(models: Models) -> None:
    more = config(family=models.options, network_train_text_encoder_only=True)
    with pytest.raises(UserError, match="conv_dim: does nothing, as the denoiser is not trained"):
        Adapters(models, more, plan_of("sd", "conv_dim=4"))


def test_patterns_take_kohyas_paths_and_names(models: Models) -> None:
    """sd-scripts' net has diffusers' names here, the file's names are ours; both are understood."""
    native, kohya = "input_blocks.1.1.proj_in", "down_blocks.0.attentions.0.proj_in"
    for pattern in (native, kohya, f"denoiser.{native}"):
        assert native not in ranks(models, f"exclude_patterns=['{pattern}']"), pattern
    for pattern in (native, kohya, "lora_unet_down_blocks_0_attentions_0_proj_in"):
        found = ranks(models, f"network_reg_dims={pattern}=3")
        assert [path for path, rank in found.items() if rank == 3] == [native], pattern


def test_a_file_of_the_unet_alone_is_a_fair_start_for_both(models: Models, tmp_path: Path) -> None:
    adapters(models).save(tmp_path / "unet.safetensors", {})
    more = {"network_weights": str(tmp_path / "unet.safetensors")}
    made = Adapters(models, config(family=models.options, learning_rate=1e-3, **more), plan_of("sd", "conv_dim=2"))
    made.remove()
    large = len(places(models, plan_of("sd", "conv_dim=2"))) - len(places(models, plan_of("sd")))
    text = len(places(models, plan_of("sd"), "clip_l"))
    assert made.notices == (
        f"network_weights has nothing for {large} of the {len(places(models, plan_of('sd', 'conv_dim=2')))} trained "
        "layers of denoiser, which start anew",
        f"network_weights has nothing for {text} of the {text} trained layers of clip_l, which start anew",
    )
    given = files.load(tmp_path / "unet.safetensors")
    made.save(tmp_path / "both.safetensors", {})
    after = files.load(tmp_path / "both.safetensors")
    assert given.keys() < after.keys() and all(bool((after[name] == t).all()) for name, t in given.items())


def test_the_kind_is_found_in_the_file(models: Models, tmp_path: Path) -> None:
    """In any dialect; a different one that was asked for is refused."""
    told = config(family=models.options, learning_rate=1e-3, network_train_unet_only=True)
    for kind, dialect in (("loha", "kohya"), ("lora", "peft"), ("lora", "comfy")):
        first = Adapters(
            models, replace(told, output=replace(told.output, dialect=dialect)), plan_of("sd", network_module=kind)
        )
        first.remove()
        first.save(tmp_path / "a.safetensors", {})
        more = {"network_weights": str(tmp_path / "a.safetensors")}
        for dims in ({}, {"dim_from_weights": True}):
            assert plan_of("sd", **more, **dims).kind.__name__.lower() == kind
    other = plan_of("sd", network_module="loha", **more)
    with pytest.raises(UserError, match="the file holds LoRA, and LoHa is trained: name its kind with network_module"):
        Adapters(models, config(family=models.options, learning_rate=1e-3, network_train_unet_only=True, **more), other)
    assert plan_of("sd", network_weights=str(tmp_path / "none.safetensors")).kind.__name__ == "LoRA"


def test_included_layers_are_added_whatever_is_excluded(models: Models) -> None:
    plain = ranks(models)
    found = ranks(
        models, "exclude_patterns=['.*attn.*', '.*ff.*']", r"include_patterns=['.*attn2\.to_q', 'time_embed\.0']"
    )
    kept = {path for path in plain if "attn" not in path and ".ff." not in path}
    assert found.keys() == kept | {path for path in plain if path.endswith("attn2.to_q")} | {"time_embed.0"}
    assert ranks(models, "target=none", r"include_patterns=out\.2").keys() == {"out.2"}


def test_alphas_and_rates_by_pattern(models: Models) -> None:
    plan = plan_of("sd", "network_reg_alphas=.*attn1.*=7", "network_reg_dims=.*attn1.*=3,.*attn2.*=0")
    found = {p.path: p.options for p in places(models, plan)}
    assert not any("attn2" in path for path in found)
    assert all((o.rank, o.alpha) == ((3, 7.0) if "attn1" in path else (4, 1.0)) for path, o in found.items())
    made = adapters(models, "network_reg_lrs=.*attn1.*=5e-5,.*attn2.*=0", "up_lr_weight=zeros+2")
    assert set(by_rate(made.groups())) == {5e-5, 1e-3, 2e-3}
    assert not any("attn2" in path for _, path in made.network.by_path())
