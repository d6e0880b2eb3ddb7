"""Exactly what is named is trained, and what is saved is what was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from training import Train, config

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.errors import UserError
from sfumato.families.sd.facts import Options
from sfumato.families.sd.strategies import SdEncode
from sfumato.formats.files import load
from sfumato.models.components import ComponentWeights
from sfumato.train import checkpoints, pipeline, run

KOHYAS = set((Path(__file__).parents[1] / "fixtures" / "kohya_metadata.txt").read_text().split())
"""Fields that sd-scripts writes into an adapter trained on a single file."""
UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def without_average(model: Path) -> dict[str, torch.Tensor]:
    """The average of the old U-Net does not go with a new one."""
    tensors = load(model)
    assert "model_ema.decay" in tensors
    return {name: t for name, t in tensors.items() if not name.startswith("model_ema.")}


@pytest.mark.parametrize("text", [False, True], ids=["U-Net", "U-Net and text encoder"])
def test_full_training_changes_what_it_says(train: Train, model: Path, text: bool) -> None:
    after = load(train("full", "full", train_text_encoder=text, max_train_steps=1) / "out.safetensors")
    names = changed(without_average(model), after)
    assert any(n.startswith(UNET) for n in names)
    assert any(n.startswith(TEXT) for n in names) == text
    assert not any(n.startswith(VAE) for n in names)
    # Every tensor of the U-Net: none hangs loose.
    assert {n for n in after if n.startswith(UNET)} <= names


def test_the_last_blocks_stay_as_they_are(train: Train, model: Path) -> None:
    after = load(train("full", "full", num_last_block_to_freeze=2, max_train_steps=1) / "out.safetensors")
    unet = {n for n in after if n.startswith(UNET)}
    last = sorted({int(n.split(".")[3]) for n in unet if n.startswith(f"{UNET}output_blocks.")})[-2:]
    frozen = {n for n in unet if n.startswith(tuple(f"{UNET}output_blocks.{i}." for i in last))}
    assert frozen and changed(without_average(model), after) == unet - frozen
    with pytest.raises(UserError, match=r"num_last_block_to_freeze 99: the denoiser has [0-9]+ blocks"):
        train("more", "full", num_last_block_to_freeze=99)


@pytest.mark.parametrize(
    ("options", "prefixes"),
    [
        ({}, {"lora_unet", "lora_te"}),
        ({"network_train_unet_only": True}, {"lora_unet"}),
        ({"network_train_text_encoder_only": True}, {"lora_te"}),
        ({"text_encoder_lr": (0.0,)}, {"lora_unet"}),
        ({"cache_text_encoder_outputs": True, "network_train_unet_only": True}, {"lora_unet"}),
        ({"network_args": ("conv_dim=2",)}, {"lora_unet", "lora_te"}),
    ],
    ids=["both", "U-Net", "text", "text rate 0", "cached text", "LoCon"],
)
def test_adapters_are_put_where_they_are_asked_for(train: Train, options: dict[str, Any], prefixes: set[str]) -> None:
    tensors = load(train("lora", **options) / "out.safetensors")
    assert {"_".join(name.split("_")[:2]) for name in tensors} == prefixes
    still = {name for name, t in tensors.items() if name.endswith("lora_up.weight") and not t.any()}
    # The middle of this net sees one pixel, and a softmax over one number has no gradient, or what a processor rounds that to.
    assert still <= {
        n
        for n in tensors
        if "mid_block" in n and n.endswith(("attn1_to_q.lora_up.weight", "attn1_to_k.lora_up.weight"))
    }
    assert any(t.ndim == 4 and "resnets" in name for name, t in tensors.items()) == ("network_args" in options)


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"mixed_precision": "bf16"}, {"full_bf16": True, "mixed_precision": "bf16"}],
    ids=str,
)
def test_memory_and_precision_options_train(train: Train, options: dict[str, Any]) -> None:
    folder = train("a", max_train_steps=3, **options)
    losses = [json.loads(line)["loss"] for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    if options == {"gradient_checkpointing": True}:
        plain = [
            json.loads(line)["loss"] for line in (train("b", max_train_steps=3) / "out.jsonl").read_text().splitlines()
        ]
        assert losses == pytest.approx(plain, abs=1e-6)


def test_max_norm_is_logged_by_sd_scripts_names(train: Train) -> None:
    """Of the weights after each step: how many were scaled down, and the norms after that."""
    folder = train("a", scale_weight_norms=1e-4, max_train_steps=2, learning_rate=1e-2)
    for line in (folder / "out.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert entry["max_norm/keys_scaled"] >= 1
        assert 0 < entry["max_norm/average_key_norm"] <= entry["max_norm/max_key_norm"] * 1.001
        assert entry["max_norm/max_key_norm"] == pytest.approx(1e-4, rel=1e-3)
        assert entry["grad_norm"] > 0
    network = load(folder / "out.safetensors")
    up, down = (
        next(t for name, t in sorted(network.items()) if name.endswith(f"{which}.weight")) for which in ("up", "down")
    )
    assert torch.linalg.matrix_norm(up.flatten(1) @ down.flatten(1)) <= 1.01e-4


@pytest.mark.parametrize(("kind", "args"), [("dora", ()), ("lora", ("init=pissa",)), ("full", ())])
def test_max_norm_that_has_no_meaning_is_refused_before_training(
    train: Train, tmp_path: Path, kind: str, args: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match="scale_weight_norms has no meaning"):
        train("a", network_module=kind, network_args=args, scale_weight_norms=1.0)
    assert not (tmp_path / "a" / "out.jsonl").exists()


def test_stopping_the_text_encoder_freezes_it(train: Train) -> None:
    early = load(train("a", stop_text_encoder_training=2, max_train_steps=2) / "out.safetensors")
    late = load(train("b", stop_text_encoder_training=2, max_train_steps=3) / "out.safetensors")
    moved = changed(early, late)
    assert moved
    assert not any(name.startswith("lora_te") for name in moved)


def test_start_from_an_adapter(train: Train) -> None:
    first = train("a", network_dim=3) / "out.safetensors"
    again = train("b", network_weights=str(first), dim_from_weights=True, learning_rate=1e-30) / "out.safetensors"
    one, two = load(first), load(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_base_weights_are_merged(train: Train, model: Path) -> None:
    adapter = train("a") / "out.safetensors"
    # The warm-up's first step has a rate of 0.
    still = {"max_train_steps": 1, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1}
    merged = load(train("b", "full", base_weights=(str(adapter),), **still) / "out.safetensors")
    names = changed(without_average(model), merged)
    assert names and all(name.endswith((".weight",)) for name in names)


def test_results_and_states_by_step_and_epoch(train: Train) -> None:
    folder = train(
        "a",
        max_train_steps=9,
        save_every_n_steps=2,
        save_last_n_steps=2,
        save_every_n_epochs=1,
        save_last_n_epochs=1,
        save_state=True,
    )
    found = {p.name for p in folder.iterdir()}
    assert "out.safetensors" in found and "out-state" in found
    steps = sorted(n for n in found if "step" in n)
    assert steps == sorted(f"out-step{s:08d}{end}" for s in (6, 8) for end in (".safetensors", "-state"))
    assert "out-000002.safetensors" in found and "out-000001.safetensors" not in found


def test_the_arithmetic_of_kept_files() -> None:
    from sfumato.config import OutputConfig

    output = OutputConfig(
        output_name="x", save_every_n_steps=100, save_last_n_steps=300, save_every_n_epochs=2, save_last_n_epochs=3
    )
    assert checkpoints.after_step(output, 150) is None
    saving = checkpoints.after_step(output, 1000)
    assert saving is not None and (saving.name, saving.old_result) == ("x-step00001000", "x-step00000600")
    by_epoch = checkpoints.after_epoch(output, 8, 20)
    assert by_epoch is not None and (by_epoch.name, by_epoch.old_result) == ("x-000008", "x-000002")
    assert checkpoints.after_epoch(output, 20, 20) is None
    assert checkpoints.every_n_epochs(OutputConfig(save_n_epoch_ratio=4), 10) == 2


def test_metadata_says_how_it_was_made(train: Train) -> None:
    settings = {"network_module": "networks.lora_flux", "optimizer_args": ("weight_decay=0.5", "betas=0.8,0.9")}
    path = train("a", training_comment="hello", **settings) / "out.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["ss_network_module"] == "networks.lora_flux"
        and metadata["ss_network_dim"] == "2"
        and metadata["ss_steps"] == "2"
    )
    assert metadata["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.5,betas=(0.8, 0.9))"
    assert KOHYAS - metadata.keys() == set()
    assert metadata["ss_training_comment"] == "hello" and metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert len(metadata["sshs_model_hash"]) == 64
    assert json.loads(metadata["ss_tag_frequency"])["images"]["red"] == 5


def test_a_whole_models_metadata_says_nothing_of_adapters(train: Train) -> None:
    with safe_open(train("a", "full", max_train_steps=1) / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_steps"] == "1" and not [
        name for name in metadata if name.startswith("ss_network_") or name == "ss_scale_weight_norms"
    ]


def test_sd2_with_v_prediction_trains(train: Train, tmp_path: Path) -> None:
    from sfumato.families.sd.facts import Options

    model = tiny.tiny_sd2(tmp_path / "sd2")
    folder = train(
        "v", pretrained_model_name_or_path=str(model), family=Options(v_parameterization=True), min_snr_gamma=5.0
    )
    with safe_open(folder / "out.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"


def test_samples_are_sampled_at_the_runs_own_size_and_named_as_sd_scripts_names_them(
    train: Train, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --s 2 --d 1\na dog --w 32 --h 48 --s 2\n")
    folder = train(
        "a",
        sample_prompts=str(tmp_path / "prompts.txt"),
        max_train_steps=4,
        sample_every_n_steps=2,
        sample_at_first=True,
        sample_sampler="euler",
    )
    sizes = {}
    for path in (folder / "sample").glob("*.png"):
        name = re.sub(r"_\d{14}", "", path.stem)
        with Image.open(path) as image:
            sizes[name] = image.size
    assert sizes == {
        f"out_{when}_{n}": size
        for when in ("e000000", "000002", "000004")
        for n, size in (("00_1", (64, 64)), ("01", (32, 48)))
    }


def test_sample_draws_at_the_size_that_the_file_was_trained_at(train: Train, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --s 1 --d 1\n")
    lora = train("a", max_train_steps=1) / "out.safetensors"
    settings = {
        "sample_prompts": str(tmp_path / "prompts.txt"),
        "sample_sampler": "euler",
        "output_dir": str(tmp_path / "drawn"),
    }
    [path] = pipeline.main(config(pretrained_model_name_or_path=str(model), network_weights=str(lora), **settings))
    with Image.open(path) as image:
        assert image.size == (64, 64)


def test_sampling_does_not_change_training(train: Train, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    plain = load(train("a", network_dropout=0.2) / "out.safetensors")
    drawn = load(
        train("b", network_dropout=0.2, sample_prompts=str(tmp_path / "prompts.txt"), sample_every_n_steps=1)
        / "out.safetensors"
    )
    assert not changed(plain, drawn)


def calls_of(monkeypatch: pytest.MonkeyPatch, method: str) -> list[str]:
    """The parts of which a method of `ComponentWeights` is called from now on."""
    calls, old = list[str](), getattr(ComponentWeights, method)

    def recorded(weights: ComponentWeights, *args: Any) -> Any:
        calls.append(weights.component.name)
        return old(weights, *args)

    monkeypatch.setattr(ComponentWeights, method, recorded)
    return calls


def test_a_second_start_makes_neither_vae_nor_text_encoder(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they say is in the cache; the result is the same, and a whole model still has them, from its file."""
    settings: dict[str, Any] = {
        "cache_text_encoder_outputs_to_disk": True,
        "cache_latents_to_disk": True,
        "cache_dir": str(tmp_path / "cache"),
    }
    first = load(train("a", "full", **settings) / "out.safetensors")
    made, read = (calls_of(monkeypatch, name) for name in ("empty", "put_into"))
    second = load(train("b", "full", **settings) / "out.safetensors")
    assert made == read == ["denoiser"]
    assert changed(first, second) == set()
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n")
    train(
        "c",
        "full",
        **settings,
        sample_prompts=str(tmp_path / "prompts.txt"),
        sample_at_first=True,
        sample_sampler="euler",
    )
    assert read[1:] == ["clip_l", "denoiser", "vae"]  # encoders leave before the denoiser comes


def test_what_is_cached_beforehand_is_what_training_would_cache(
    train: Train, model: Path, images: Path, tmp_path: Path
) -> None:
    """`sfumato cache` merges base_weights as training does: text encoders say something else with them; and what they
    say is the same where they are read block by block."""
    adapter = train("a", learning_rate=1e-1) / "out.safetensors"
    settings = {
        "pretrained_model_name_or_path": str(model),
        "base_weights": (str(adapter),),
        "cache_dir": str(tmp_path / "cache"),
    }
    data = DatasetConfig(subsets=(SubsetConfig(image_dir=str(images)),), resolution=(64, 64))

    def cached(folder: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (folder / "entries").rglob("*.safetensors")}

    run.cache(config(**settings, cache_text_encoder_outputs_to_disk=True), (data,))
    before = cached(tmp_path / "cache")
    train(
        "b",
        **{**settings, "cache_dir": str(tmp_path / "other")},
        cache_text_encoder_outputs_to_disk=True,
        stream_text_encoders=True,
        max_train_steps=1,
    )
    assert before and before == cached(tmp_path / "other")


def test_captions_without_padding_train_and_samples_have_it(train: Train, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a picture --w 64 --h 64 --s 2 --d 1")
    family, lengths = Options(no_token_padding=True), list[int]()
    encode = SdEncode.encode
    with patch.object(
        SdEncode, "encode", lambda s, e, tokens: lengths.append(tokens["ids"].shape[2]) or encode(s, e, tokens)
    ):
        train("plain", family=family, sample_prompts=str(tmp_path / "prompts.txt"), sample_every_n_steps=2)
    assert max(lengths[:2]) < 77 and set(lengths[2:]) == {77}
    with pytest.raises(UserError, match="no_token_padding: captions that are cached or longer than 75 tokens"):
        train("cached", family=family, cache_text_encoder_outputs=True)
