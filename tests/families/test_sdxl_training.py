"""What only Stable Diffusion XL has in training: rates by block and by text encoder, sizes of images, v prediction, adapters in diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sparse import sparse
from tinies import sdxl
from torch import Tensor, nn
from training import Train, config

from sfumato.adapters.insert import from_state
from sfumato.cli import flags, kohya
from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.data.batch import Cond
from sfumato.errors import UserError
from sfumato.families.sd.network_args import block_number
from sfumato.families.sdxl.facts import BLOCKS, Options
from sfumato.families.sdxl.family import FAMILY
from sfumato.families.sdxl.names import CLIP_G, CLIP_L
from sfumato.families.sdxl.network_args import UNET_BLOCKS
from sfumato.formats.files import load
from sfumato.models import loading
from sfumato.models.base import Models, SampleInfo
from sfumato.models.detection import PREFIX
from sfumato.sampling.prompts import Prompt
from sfumato.sampling.sample import sample_latents
from sfumato.train import dist, loop, run
from sfumato.train.trainables import Full, read_adapter

Keys = Callable[[str], dict[str, tuple[int, ...]]]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.write(tmp_path_factory.mktemp("model")).model


@pytest.fixture
def go(train: Train, single: Path) -> Callable[..., Path]:
    """Train the tiny model with these flat options; returns the result."""

    def trained(name: str, *args: Any, options: dict[str, Any] | None = None, **more: Any) -> Path:
        family = Options(**(options or {}))
        told = {"pretrained_model_name_or_path": str(single), "max_train_steps": 1, "family": family, **more}
        return train(name, *args, **told) / "out.safetensors"

    return trained


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- rates ---


def test_every_weight_of_the_unet_has_one_of_23_rates(keys: Keys) -> None:
    """Counted by sd-scripts' rule: by the number after the part's name."""
    found: dict[int | None, set[str]] = {}
    for path in keys("sdxl.unet"):
        found.setdefault(block_number(UNET_BLOCKS, path), set()).add(
            ".".join(path.split(".")[: 1 if re.match(r"out\.|time|label", path) else 2])
        )
    wanted = [
        {"time_embed", "label_emb"},
        *({f"input_blocks.{i}"} for i in range(9)),
        *({f"middle_block.{i}"} for i in range(3)),
    ]
    wanted += [*({f"output_blocks.{i}"} for i in range(9)), {"out"}]
    assert [found[i] for i in range(BLOCKS)] == wanted


def test_rates_by_block(single: Path, go: Callable[..., Path]) -> None:
    """Blocks whose rate is 0 are left as they are, others go by their own."""
    rates = [0.0] * BLOCKS
    rates[0], rates[5], rates[22] = 1e-3, 2e-3, 3e-3
    moved = changed(load(single), load(go("a", "full", options={"block_lr": tuple(rates)})))
    own = {name.removeprefix(PREFIX) for name in load(single) if name.startswith(PREFIX)}
    assert moved == {
        PREFIX + path for path in own if path.startswith(("time_embed.", "label_emb.", "input_blocks.4.", "out."))
    }
    models = loading.load(FAMILY, str(single), Options(block_lr=tuple(rates)))
    groups = Full(models, config(family=models.options)).groups()
    assert sorted(group.lr for group in groups) == [1e-3, 2e-3, 3e-3]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "encoded in the step"])
def test_late_blocks_alone_train_on_latents_that_are_contiguous(
    go: Callable[..., Path], cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch ends with a segmentation fault in the backward pass of a GroupNorm whose input has its channels last and needs no gradient."""
    norm = nn.GroupNorm.forward

    def checked(self: nn.GroupNorm, x: Tensor) -> Tensor:
        assert x.is_contiguous() or not torch.is_grad_enabled(), x.stride()
        return norm(self, x)

    monkeypatch.setattr(nn.GroupNorm, "forward", checked)
    go("a", "full", options={"block_lr": (0.0,) * 3 + (1e-3,) * (BLOCKS - 3)}, cache_latents=cached)


def test_rates_of_0_everywhere_leave_nothing_to_train(go: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="nothing is left to train"):
        go("a", "full", options={"block_lr": (0.0,) * BLOCKS})


UNUSED = re.compile(re.escape(CLIP_L) + r"text_model\.(encoder\.layers\.11\.|final_layer_norm\.).*")


@pytest.mark.parametrize(
    ("rates", "prefixes"),
    [
        ({}, (CLIP_L, CLIP_G)),
        ({"learning_rate_te1": 0.0}, (CLIP_G,)),
        ({"learning_rate_te2": 0.0}, (CLIP_L,)),
        ({"learning_rate_te1": 0.0, "learning_rate_te2": 0.0}, ()),
    ],
    ids=str,
)
def test_text_encoders_whose_rate_is_0_are_left_as_they_are(
    single: Path, go: Callable[..., Path], rates: dict[str, float], prefixes: tuple[str, ...]
) -> None:
    before = load(single)
    moved = changed(before, load(go("a", "full", options=rates, train_text_encoder=True)))
    text = {name for name in before if name.startswith(prefixes)} if prefixes else set()
    nets = {name for name in text if not UNUSED.fullmatch(name) and not name.endswith(("position_ids", "logit_scale"))}
    assert moved == nets | {name for name in before if name.startswith(PREFIX)}


def test_what_has_no_gradient_is_not_trained(single: Path) -> None:
    models = loading.load(FAMILY, str(single), Options(learning_rate_te2=3e-5))
    full = Full(
        models, config(family=models.options, train_text_encoder=True, learning_rate=1e-5, learning_rate_te=2e-5)
    )
    assert {group.name: group.lr for group in full.groups()} == {"denoiser": 1e-5, "clip_l": 2e-5, "clip_g": 3e-5}
    weights = full.weights()
    assert not [name for name in weights if UNUSED.fullmatch(CLIP_L + name.removeprefix("clip_l."))]
    cond = models.encode(models.tokenize(["a cat on a mat"]))
    (cond["hidden"].square().sum() + cond["pooled"].square().sum()).backward()
    assert {name for name, p in weights.items() if p.grad is None and not name.startswith("denoiser.")} == set()
    held = {n: p for n, p in models.encoders["clip_l"].named_parameters() if not p.requires_grad}
    assert held and all(UNUSED.fullmatch(CLIP_L + name) for name in held)


def test_an_adapters_text_encoders_have_rates_of_their_own(go: Callable[..., Path]) -> None:
    """One of them 0: that text encoder has no adapter."""
    tensors = load(go("a", text_encoder_lr=(0.0, 1e-3)))
    assert {"_".join(name.split("_")[:2]) for name in tensors} == {"lora_unet", "lora_te2"}
    assert {"_".join(name.split("_")[:2]) for name in load(go("b", text_encoder_lr=(1e-3,)))} == {
        "lora_unet",
        "lora_te1",
        "lora_te2",
    }


# --- the command line ---


@pytest.fixture
def home(keys: Keys, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base model of full size that is only a header."""
    sparse(tmp_path / "base.safetensors", keys("sdxl.single_file"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{images}"\n'
    )
    return tmp_path


BASE = ["--pretrained_model_name_or_path", "base.safetensors", "--dataset_config", "data.toml"]
RATES = ",".join(["1e-5"] * 22)


def errors(method: flags.Method, *argv: str) -> list[str]:
    with pytest.raises(UserError) as error:
        flags.resolve_all([*BASE, *argv], method)
    return list(error.value.messages)


def test_lists_of_rates(home: Path) -> None:
    found = flags.resolve_all([*BASE, "--block_lr", f"{RATES},0"], "full").config.family
    assert isinstance(found, Options) and found.block_lr == (1e-5,) * 22 + (0.0,)
    assert errors("full", "--block_lr", RATES) == ["--block_lr: expected 23 numbers with commas between them, found 22"]
    assert errors("full", "--block_lr", f"{RATES},-1") == ["--block_lr: expected 0 or more, found -1"]
    assert errors("full", "--train_text_encoder", "--learning_rate_te1", "-1") == [
        "--learning_rate_te1: expected 0 or more, found -1"
    ]


@pytest.mark.parametrize(
    ("method", "argv", "said"),
    [
        ("network", ["--block_lr", f"{RATES},0"], "block_lr"),
        ("network", ["--learning_rate_te2", "1e-5"], "learning_rate_te2"),
        ("full", ["--learning_rate_te1", "1e-5"], "learning_rate_te1"),
        ("full", ["--block_lr", f"{RATES},0", "--learning_rate", "1e-5"], "learning_rate"),
        (
            "full",
            ["--train_text_encoder", "--learning_rate_te1", "0", "--learning_rate_te2", "0"],
            "train_text_encoder",
        ),
        (
            "full",
            [
                "--train_text_encoder",
                "--learning_rate_te1",
                "0",
                "--learning_rate_te2",
                "1e-5",
                "--learning_rate_te",
                "1e-5",
            ],
            "learning_rate_te",
        ),
    ],
)
def test_settings_without_effect_are_refused(home: Path, method: flags.Method, argv: list[str], said: str) -> None:
    (message,) = errors(method, *argv)
    assert message.startswith(f"--{said}: ")


def test_rates_that_act_are_taken(home: Path) -> None:
    both = [
        "--train_text_encoder",
        "--learning_rate_te1",
        "0",
        "--learning_rate_te2",
        "1e-6",
        "--learning_rate",
        "1e-5",
    ]
    assert flags.resolve_all([*BASE, *both], "full").notices == ()
    by_block = ["--train_text_encoder", "--block_lr", f"{RATES},0", "--learning_rate", "1e-5"]
    assert flags.resolve_all([*BASE, *by_block], "full").notices == ()


def test_settings_of_stable_diffusion_alone_are_refused(home: Path) -> None:
    assert errors("network", "--v2") == ["--v2: is a setting of sd, but the base model is of the family sdxl"]


def test_clip_skip_is_stated_to_users_of_kohyas_scripts(home: Path) -> None:
    """Old command lines have it; sd-scripts does not use it for this family either."""
    (message,) = errors("network", "--clip_skip", "2")
    assert message.startswith("--clip_skip: ")
    found = kohya.resolve("sdxl_train_network", [*BASE, "--clip_skip", "2"])
    assert found.config.family == Options()
    assert any(notice.startswith("--clip_skip: ") for notice in found.notices)


def test_kohyas_scripts_name_the_family(home: Path) -> None:
    config = kohya.resolve("sdxl_train", [*BASE, "--train_text_encoder"]).config
    assert isinstance(config.family, Options) and config.train.train_text_encoder
    assert not kohya.resolve("sdxl_train", BASE).config.train.train_text_encoder
    said = r"train_network\.py is for the family sd, but the base model is of the family sdxl: use sdxl_train_network\.py or `sfumato train network`"
    with pytest.raises(UserError, match=said):
        kohya.resolve("train_network", BASE)


# --- runs ---


def test_the_true_crop_is_told(single: Path, tmp_path: Path) -> None:
    """sd-scripts tells the margins of the bucket in its place."""
    (tmp_path / "wide").mkdir()
    Image.effect_noise((96, 64), 40).save(tmp_path / "wide" / "a.png")
    data = DatasetConfig(
        subsets=(SubsetConfig(image_dir=str(tmp_path / "wide"), class_tokens="a"),), resolution=(64, 64), batch_size=1
    )
    told = config(
        pretrained_model_name_or_path=str(single),
        output_dir=str(tmp_path / "out"),
        max_train_steps=1,
        network_dim=2,
        family=Options(),
    )
    a_run = run.prepare(told, "network", (data,), dist.world(), 0.0)
    models: Models = a_run.trainable.models  # type: ignore[attr-defined]
    heard: list[list[int]] = []

    def spy(models: Models, cond: Cond, setting: SampleInfo) -> Cond:
        heard.extend(setting.sizes.tolist())
        return FAMILY.condition(models, cond, setting)

    models.family = replace(FAMILY, condition=spy)
    assert a_run.log is not None
    with a_run.log:
        assert loop.train(a_run)
    assert heard == [[64, 96, 0, 16, 64, 64]]


def test_a_model_that_predicts_v_trains_on_pure_noise(train: Train, tmp_path: Path) -> None:
    path = sdxl.put(tmp_path / "v" / "model.safetensors", {**sdxl.single_file(), "v_pred": torch.tensor([])})
    told = {"family": Options(), "zero_terminal_snr": True, "max_train_steps": 2}
    result = train("a", pretrained_model_name_or_path=str(path), **told) / "out.safetensors"
    with safe_open(result, "pt") as file:
        said = file.metadata()
    assert said["modelspec.prediction_type"] == "v" and said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora" and said["ss_v2"] == "False"


@pytest.mark.parametrize("size", [(72, 56), (88, 40)])
def test_sides_are_multiples_of_8(
    go: Callable[..., Path], single: Path, images: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    """sd-scripts asks for multiples of 32."""
    data = DatasetConfig(subsets=(SubsetConfig(image_dir=str(images)),), resolution=size, batch_size=2)
    told = {
        "pretrained_model_name_or_path": str(single),
        "output_dir": str(tmp_path / "out"),
        "max_train_steps": 1,
        "network_dim": 2,
    }
    run.train(config(**told, output_name="out", family=Options()), "network", (data,))
    (line,) = (tmp_path / "out" / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] > 0


def test_a_whole_model_is_saved_as_a_folder(go: Callable[..., Path], single: Path, tmp_path: Path) -> None:
    result = go("a", "full", save_model_as="diffusers", train_text_encoder=True).with_suffix("")
    pipe, models = type(sdxl.pipeline()).from_pretrained(result), loading.load(FAMILY, str(result), Options())
    noise = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    prompt = Prompt(prompt="a cat", negative_prompt="dull", width=48, height=32, sample_steps=3, scale=5.0)
    process = models.process(config().noise, config().loss)
    (ours,) = sample_latents(models, [prompt], process=process, sampler="euler", noise=noise)
    torch.testing.assert_close(ours, sdxl.drawn(pipe, prompt, noise), atol=1e-3, rtol=1e-3)


# --- adapters in diffusers ---

PROMPT = Prompt(prompt="image 1, red", negative_prompt="blue", width=64, height=64, sample_steps=2, scale=5.0)


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_an_adapter_does_the_same_in_diffusers(go: Callable[..., Path], single: Path, dialect: str) -> None:
    adapter = go("a", dialect=dialect, network_alpha=1.0, learning_rate=4e-2, max_train_steps=2)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    models = loading.load(FAMILY, str(single), Options())
    process = models.process(config().noise, config().loss)

    def ours() -> Tensor:
        return sample_latents(models, [PROMPT], process=process, sampler="euler", noise=noise)[0]

    plain = ours()
    from_state(models.nets(), read_adapter(models, adapter)).eval()
    adapted = ours()
    assert (adapted - plain).abs().max() > 0.01
    pipe = sdxl.pipeline()
    pipe.load_lora_weights(str(adapter), adapter_name="ours")
    try:
        torch.testing.assert_close(adapted, sdxl.drawn(pipe, PROMPT, noise), rtol=0, atol=1e-3)
        inside = {
            part: sum("lora_A.ours.weight" in name for name, _ in net.named_parameters())
            for part, net in (("denoiser", pipe.unet), ("clip_l", pipe.text_encoder), ("clip_g", pipe.text_encoder_2))
        }
    finally:
        pipe.unload_lora_weights()
    by_path = read_adapter(models, adapter)
    assert inside == {part: sum(component == part for component, _ in by_path) for part in inside}
