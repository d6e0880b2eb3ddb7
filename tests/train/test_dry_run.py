"""`sfumato plan` is the truth: what training refuses, it refuses, with the same words, and before weights are read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from training import config

from sfumato.config import Config, DatasetConfig, Method, ModelConfig, SubsetConfig
from sfumato.errors import UserError
from sfumato.families.sd.facts import Options
from sfumato.formats import files
from sfumato.models.base import Models
from sfumato.models.loading import load
from sfumato.train import check, devices, dist, log, plan, run
from sfumato.train.caching import open_data

Refused = Callable[..., str]


def data(images: Path, **subset: Any) -> tuple[DatasetConfig, ...]:
    folder = SubsetConfig(image_dir=str(images), **subset)
    return (DatasetConfig(subsets=(folder,), resolution=(64, 64), batch_size=2),)


def settings(model: Path, where: Path, **options: Any) -> Config:
    given = {
        "pretrained_model_name_or_path": str(model),
        "output_dir": str(where / "out"),
        "output_name": "lora",
        "max_train_steps": 4,
    }
    return config(**{**given, "network_dim": 2, **options})


@cache
def _outline(model: ModelConfig, family: Any) -> Models:
    """A check leaves the nets as they are, so one outline serves them all."""
    return devices.outline_models(Config(model=model, family=family))


@pytest.fixture
def refused(model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """What `plan` says of these options; `train` says the same, and neither reads a weight."""
    monkeypatch.setattr(check, "outline_models", lambda given, method: _outline(given.model, given.family))
    monkeypatch.setattr(devices, "read_values", lambda *_, **__: pytest.fail("weights were read"))

    def ask(method: Method = "network", subset: dict[str, Any] | None = None, **options: Any) -> str:
        given, datasets = settings(model, tmp_path, **options), data(images, **(subset or {}))
        with pytest.raises(UserError) as by_plan:
            plan.show(given, method, datasets)
        with pytest.raises(UserError) as by_train:
            run.train(given, method, datasets)
        assert by_plan.value.messages == by_train.value.messages
        return str(by_plan.value)

    return ask


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network_train_text_encoder_only": True, "stop_text_encoder_training": 0}, "nothing is left to train"),
        ({"save_model_as": "diffusers"}, "an adapter is saved as safetensors, ckpt or pt"),
        ({"network_module": "networks.nothing"}, "network_module"),
        ({"network_args": ("conv_dim=x",)}, "conv_dim"),
        ({"text_encoder_lr": (1e-4, 1e-5), "network_train_unet_only": True}, "text_encoder_lr"),
        ({"clip_skip": 9}, "clip_skip"),
        ({"log_with": "wandb"}, "wandb is not installed"),
        ({"network_weights": "none.safetensors"}, "no such file"),
        ({"base_weights": ("none.safetensors",)}, "no such file"),
        ({"vae": "none.safetensors"}, "vae"),
        ({"tokenizer": "nowhere"}, "tokenizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_settings_and_headers_tell(
    refused: Refused, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    if "clip_skip" in options:
        options = {"family": Options(clip_skip=options["clip_skip"])}
    assert words in refused(**options)


def test_adapters_that_do_not_fit(refused: Refused, tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{layer}.lora_down.weight": torch.ones(3, 32), f"{layer}.lora_up.weight": torch.ones(32, 3)}
    files.save(tmp_path / "other.safetensors", {f"x{name}": t for name, t in tensors.items()})
    files.save(
        tmp_path / "wide.safetensors", {name: torch.cat([t, t], int("down" in name)) for name, t in tensors.items()}
    )
    assert "name no layer" in refused(network_weights=str(tmp_path / "other.safetensors"))
    assert "name no layer" in refused(base_weights=(str(tmp_path / "other.safetensors"),))
    base = str(tiny.tiny_sd1(tmp_path / "base"))
    for text in (refused(network_weights=base), refused(base_weights=(base,))):
        assert "model.safetensors is a base model, not an adapter (such as a LoRA)" in text
    files.save(tmp_path / "empty.safetensors", {})
    text = refused(base_weights=(str(tmp_path / "empty.safetensors"),))
    assert text.count("empty.safetensors") == 1 and "base_weights" in text and "holds no tensors" in text
    for options in ({"base_weights": (wide := str(tmp_path / "wide.safetensors"),)}, {"network_weights": wide}):
        text = refused(**options, **({"dim_from_weights": True} if "network_weights" in options else {}))
        assert "wide.safetensors" in text and "has shape [3, 64], expected [3, 32]" in text
    files.save(tmp_path / "half.safetensors", dict([tensors.popitem()]))
    text = refused(network_weights=str(tmp_path / "half.safetensors"), dim_from_weights=True)
    assert "half.safetensors" in text and "attn1.to_q: no kind of adapter has the tensors" in text


def test_arguments_in_one_string_are_reported_beside_each_other_and_a_file_is_named_once(
    refused: Refused, tmp_path: Path
) -> None:
    files.save(tmp_path / "nan.safetensors", {"lora_unet_x.lora_up.weight": torch.tensor([float("nan")])})
    many = {"optimizer_args": ("a=1 b=2",), "lr_scheduler_args": ("0",), "network_args": ("c=1 d=2",)}
    text = refused(**many, base_weights=(str(tmp_path / "nan.safetensors"),))
    assert all(f"{name} {texts[0]!r}: " in text for name, texts in many.items())
    assert text.count("nan.safetensors") == 1


def test_samplers_and_prompts(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --ss pndm\n", encoding="utf-8")
    v = Options(v_parameterization=True)
    text = refused(
        sample_prompts=str(tmp_path / "prompts.txt"), sample_every_n_steps=2, zero_terminal_snr=True, family=v
    )
    assert "pndm: cannot begin at zero signal" in text
    (tmp_path / "prompts.txt").write_text("a cat --zz 4\n", encoding="utf-8")
    text = refused(sample_prompts=str(tmp_path / "prompts.txt"), sample_sampler="best", network_args=("colour=2",))
    assert "--zz" in text and "'best'" in text and "'colour'" in text  # all mistakes at once


@pytest.mark.parametrize(
    ("options", "subset", "words"),
    [
        ({"cache_latents": True}, {"random_crop": True}, "cannot be cached"),
        ({"cache_text_encoder_outputs": True}, {"shuffle_caption": True}, "cannot be cached"),
        (
            {"cache_text_encoder_outputs": True},
            {"enable_wildcard": True, "caption_prefix": "{a|b|c|d|e|f|g|h}" * 4},
            "too many captions",
        ),
    ],
    ids=["crops", "shuffled", "wildcards"],
)
def test_what_cannot_be_kept(refused: Refused, options: dict[str, Any], subset: dict[str, Any], words: str) -> None:
    assert words in refused(subset=subset, **options)


def test_a_truncated_jpeg(refused: Refused, images: Path) -> None:
    from PIL import Image

    Image.open(images / "0.png").save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-200])
    assert "cut.jpg: damaged" in refused()


def test_weights_in_a_format_of_whole_numbers(refused: Refused, model: Path, tmp_path: Path) -> None:
    tensors = files.load(model)
    name = "model.diffusion_model.time_embed.0.weight"
    files.save(tmp_path / "odd.safetensors", {**tensors, name: torch.zeros(tensors[name].shape, dtype=torch.int32)})
    text = refused(
        pretrained_model_name_or_path=str(tmp_path / "odd.safetensors"), tokenizer=str(model.parent / "tokenizer")
    )
    assert "'time_embed.0.weight' is in the format I32" in text and "F32" in text


def test_images_that_are_too_large_for_the_model(model: Path, images: Path, tmp_path: Path) -> None:
    given = settings(model, tmp_path)
    models = devices.outline_models(given)
    models.family = dataclasses.replace(models.family, largest=lambda _: 32)
    with pytest.raises(UserError, match="dataset 1: 64 x 64 pixels are too large"):
        open_data(given, data(images), dist.outside(), models)


def test_what_is_trained_is_counted_without_values(model: Path, images: Path, tmp_path: Path) -> None:
    given = settings(model, tmp_path, network_args=("conv_dim=3",), text_encoder_lr=(1e-5,))
    checked = check.check(given, "network", data(images))
    denoiser, text = checked.trained
    assert all(p.is_meta for net in checked.models.nets().values() for p in net.parameters())
    models = load(checked.models.family, str(model), given.family)
    assert checked.plan is not None
    with check.outlined(models, given, "network", checked.plan) as real:
        groups = {g.name: sum(p.numel() for p in g.parameters) for g in real.groups()}
    assert groups == {"denoiser": denoiser.numbers, "clip_l": text.numbers}
    assert (text.layers, text.rates) == (18, (1e-5,))
    assert text.ranks == {"LoRA 2": 18} and text.sets == {"attention": 12, "ia3": 9, "linear": 18, "mlp": 6}
    assert denoiser.sets["linear"] + denoiser.sets["conv"] == denoiser.layers == sum(denoiser.ranks.values())
    assert denoiser.ranks.keys() == {"LoRA 2", "LoRA 3"}
    assert not any(m._forward_hooks for net in models.nets().values() for m in net.modules())


def test_a_micro_batch_that_cuts_no_batch_is_told(model: Path, images: Path, tmp_path: Path) -> None:
    found = check.check(settings(model, tmp_path, micro_batch=99), "network", data(images)).notes
    assert any(note.startswith("micro_batch 99: no effect, as batches have ") for note in found)


def test_text_encoders_are_streamed_where_they_are_large_and_their_outputs_cached(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def notes(**options: Any) -> list[str]:
        found = check.check(settings(model, tmp_path, **options), "network", data(images)).notes
        return [note for note in found if "block by block" in note]

    cached: dict[str, Any] = {"cache_text_encoder_outputs": True}
    assert not notes() and not notes(**cached)
    asked = notes(**cached, stream_text_encoders=True)
    assert len(asked) == 1 and asked[0].startswith("the text encoder clip_l (0.0 GiB) is read")
    monkeypatch.setattr(devices, "LARGE", 1000)
    assert notes(**cached) == asked and not notes() and not notes(**cached, stream_text_encoders=False)
    for free, streams in ((1 << 40, False), (2000, True)):
        monkeypatch.setattr(torch.cpu, "mem_get_info", lambda free=free: (free, 1 << 40), raising=False)
        assert bool(notes(**cached)) == streams


def test_results_are_named_with_their_ending(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.show(settings(model, tmp_path, save_every_n_steps=2), "network", data(images))
    text = "".join(capsys.readouterr().out.split())
    assert "lora-step00000002.safetensors" in text and "lora.safetensors" in text
    found = json.loads(json.dumps(plan.facts(settings(model, tmp_path, save_model_as="ckpt"), "full", data(images))))
    assert found["results"][-1]["files"].endswith("lora.ckpt")
    assert isinstance(found["folders"][0]["images"], int)
    assert found["steps"] == 4 and found["trained"][0]["component"] == "denoiser"
    assert not (tmp_path / "out").exists()


def test_what_images_are_for_is_said(model: Path, images: Path, tmp_path: Path) -> None:
    (learnt,) = data(images)
    (kept,) = data(images, custom_attributes={"diff_output_preservation": True})
    found = plan.facts(
        settings(model, tmp_path), "network", (dataclasses.replace(learnt, network_multiplier=-1.0), kept)
    )
    assert [row["kind"] for row in found["folders"]] == ["training at strength -1", "preserved"]


def test_what_is_held_out_is_said_and_refused_where_there_is_nothing_of_it(
    model: Path, images: Path, tmp_path: Path, refused: Refused
) -> None:
    given = settings(model, tmp_path, validate_every_n_steps=2, save_best=True)
    found = plan.facts(given, "network", data(images, validation_split=0.4))
    rows = [(row["kind"], row["images"], row["samples an epoch"]) for row in found["folders"]]
    assert rows == [("training", 3, 3), ("held out", 2, 0)]
    assert [row["after"] for row in found["results"]] == [
        "the start, every 2 steps, the end", "the best of these", "step 4",
    ]  # fmt: skip
    assert found["results"][0]["files"] == "the loss of 2 held-out images and 2 trained ones"
    assert found["results"][1]["files"].endswith("lora-best.safetensors")
    assert "validation_split holds no image out" in refused(subset={"validation_split": 0.01})


def test_what_other_programs_will_load_is_said_before_and_after_the_training(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the keys that the file will have, and then of those that it has."""
    given = settings(model, tmp_path, dialect="peft", max_train_steps=1)
    found = json.loads(json.dumps(plan.facts(given, "network", data(images))))["loads_in"]
    assert [each["client"] for each in found] == ["ComfyUI", "Forge", "diffusers", "A1111"]
    loaded, of = found[0]["loaded"], found[0]["layers"]
    assert 0 < loaded < of
    lines = [
        f"ComfyUI: {loaded} of {of} layers; it does not know the attention of denoiser in peft names: "
        "choose --dialect kohya",
        f"diffusers: {of} of {of} layers",
    ]
    capsys.readouterr()
    plan.show(given, "network", data(images))
    shown = capsys.readouterr().out
    assert [line for line in lines if line not in shown] == []
    run.train(given, "network", data(images))
    shown = capsys.readouterr().err
    assert [line for line in lines if f"lora.safetensors in {line}" not in shown] == []
