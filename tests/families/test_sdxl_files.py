"""Stable Diffusion XL's files, in and out: single files with and without VAE, folders, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tinies import encoders, sdxl
from torch import Tensor

from sfumato.config import LossConfig, NoiseConfig
from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.families.sdxl.facts import Options
from sfumato.families.sdxl.family import FAMILY
from sfumato.families.sdxl.names import CLIP_G, CLIP_L
from sfumato.formats.files import load, save
from sfumato.models import loading
from sfumato.models.autoencoders import scaled, scaling_of
from sfumato.models.base import Models
from sfumato.models.detection import PREFIX

FIRST = f"{PREFIX}input_blocks.0.0.weight"


def opened(path: Path, *, vae: Path | None = None, tokenizer: Path | None = None, **options: Any) -> Models:
    paths = {"vae": vae and str(vae), "tokenizer": tokenizer and str(tokenizer)}
    return loading.load(FAMILY, str(path), Options(**options), detect=detect_file, **paths)  # type: ignore[arg-type]


def written(models: Models, path: Path, layout: str = "single_file", **more: Any) -> Path:
    loading.save(models, path, layout=layout, **{"dtype": None, "metadata": {}, **more})
    return path


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


def states(models: Models) -> dict[str, Tensor]:
    nets = {**models.nets(), **({"vae": models.vae} if models.vaes is not None else {})}
    return {f"{name}.{k}": t for name, net in nets.items() for k, t in net.state_dict().items()}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.write(tmp_path_factory.mktemp("single")).model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sdxl.pipeline().save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


# --- single files ---


def test_a_vae_of_its_own(tmp_path: Path) -> None:
    """A file without one is trained with a VAE from a folder or a file, and stays without one when it is saved."""
    path = sdxl.put(tmp_path / "bare.safetensors", sdxl.single_file(bundled=False))
    with pytest.raises(UserError, match=r"bare\.safetensors has no VAE, .* give one with --vae"):
        assert opened(path).vae
    other = sdxl.vae(9)
    other.save_pretrained(tmp_path / "vae")
    save(tmp_path / "vae.safetensors", other.state_dict(), {})
    for name in ("vae", "vae.safetensors"):
        models = opened(path, vae=tmp_path / name)
        assert_same(dict(models.vae.state_dict()), dict(other.state_dict()))
        assert scaled(torch.ones(1), scaling_of(models.vae)).item() == pytest.approx(0.13025)
        assert_same(load(path), load(written(models, tmp_path / "out" / "again.safetensors")))


def test_text_encoders_are_needed(tmp_path: Path) -> None:
    tensors = sdxl.single_file()
    unet = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    with pytest.raises(UserError, match="holds no text_encoder; a whole model is needed"):
        opened(sdxl.put(tmp_path / "unet.safetensors", unet))
    lacking = {name: t for name, t in tensors.items() if not name.startswith(CLIP_L)}
    with pytest.raises(UserError, match="holds no text encoder clip_l"):
        opened(sdxl.put(tmp_path / "one.safetensors", lacking))
    del tensors[f"{CLIP_G}text_projection"]
    with pytest.raises(UserError, match="clip_g lacks its text_projection"):
        opened(sdxl.put(tmp_path / "unprojected.safetensors", tensors))


def test_a_trained_unet_is_not_saved_beside_the_average_of_the_old_one(tmp_path: Path) -> None:
    tensors = {**sdxl.single_file(), "model_ema.decay": torch.tensor(0.9999)}
    models = opened(sdxl.put(tmp_path / "model.safetensors", tensors))
    assert_same(tensors, load(written(models, tmp_path / "out" / "same.safetensors")))
    models.denoiser.get_parameter("out.2.bias").data += 1
    after = load(written(models, tmp_path / "out" / "model.safetensors"))
    assert tensors.keys() - after.keys() == {"model_ema.decay"}


def test_a_trained_projection_is_written_as_openclip_has_it(single: Path, tmp_path: Path) -> None:
    """Turned about: x @ p, where transformers' layer computes x @ w.T."""
    models = opened(single)
    models.encoders["clip_g"].get_parameter("text_projection.weight").data[3, 5] = 7.0
    after = load(written(models, tmp_path / "out.safetensors"))[f"{CLIP_G}text_projection"]
    assert after[5, 3] == 7.0
    assert (after != load(single)[f"{CLIP_G}text_projection"]).sum() == 1


# --- folders ---


@pytest.mark.parametrize(
    "more", [{"variant": "fp16"}, {"max_shard_size": "1MB"}, {"safe_serialization": False}], ids=str
)
def test_folders_as_people_have_them(single: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    sdxl.pipeline().save_pretrained(tmp_path / "folder", **more)
    models = opened(tmp_path / "folder")
    assert_same(states(models), states(opened(single)))
    assert models.source.layout == "diffusers"


def test_a_folder_becomes_a_single_file(folder: Path, tmp_path: Path) -> None:
    tensors = load(written(opened(folder), tmp_path / "model.safetensors"))
    expected = sdxl.single_file()
    assert expected.keys() - tensors.keys() == {
        "alphas_cumprod",
        f"{CLIP_L}text_model.embeddings.position_ids",
        f"{CLIP_G}logit_scale",
    }
    assert_same({name: expected[name] for name in tensors}, tensors)


def test_a_single_file_becomes_a_folder(single: Path, folder: Path, tmp_path: Path) -> None:
    """Its configs say what those say that diffusers itself writes for the same nets."""
    out = written(opened(single), tmp_path / "out", "diffusers")
    ours, theirs = (StableDiffusionXLPipeline.from_pretrained(f) for f in (out, folder))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert_same(getattr(ours, part).state_dict(), getattr(theirs, part).state_dict())
    # The real model's size of images; this one's VAE is made for none.
    told = {"set_alpha_to_one", "clip_sample", "skip_prk_steps"}  # for samplers other than this one
    other = {"unet": {"sample_size"}, "vae": {"sample_size"}, "scheduler": told}
    for part in ("unet", "vae", "scheduler"):
        mine, wanted = (dict(getattr(p, part).config) for p in (ours, theirs))
        differ = {k for k in mine.keys() | wanted.keys() if mine.get(k) != wanted.get(k) and not k.startswith("_")}
        assert differ <= other[part], part
    assert ours.tokenizer_2.pad_token_id == 0 and ours.tokenizer.pad_token_id == ours.tokenizer.eos_token_id
    assert ours.config.force_zeros_for_empty_prompt


def test_the_schedule_of_a_folder_is_kept(folder: Path, tmp_path: Path) -> None:
    said = folder / "scheduler" / "scheduler_config.json"
    assert json.loads(said.read_text())["timestep_spacing"] == "leading"
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    out = written(opened(folder), tmp_path / "out", "diffusers")
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text()) == json.loads(said.read_text())
    assert json.loads((out / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is False


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- prediction ---


def marked(folder: Path) -> Path:
    return sdxl.put(
        folder / "model.safetensors", {**sdxl.single_file(), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    )


def told(folder: Path) -> Path:
    return sdxl.put(folder / "model.safetensors", sdxl.single_file(), **{"modelspec.prediction_type": "v"})


def scheduled(folder: Path) -> Path:
    sdxl.pipeline("v_prediction").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[marked, told, scheduled])
def predicting_v(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Models, bool]:
    """A model, and whether its file says that its last timestep is pure noise."""
    return opened(request.param(tmp_path_factory.mktemp("model") / "model")), request.param is marked


def test_v_prediction_is_seen_from_the_file(predicting_v: tuple[Models, bool], tmp_path: Path) -> None:
    models, zero = predicting_v
    assert models.options.v_parameterization
    process = models.process(NoiseConfig(zero_terminal_snr=True), LossConfig())
    assert process.scheduler_config()["prediction_type"] == "v_prediction"
    out = written(models, tmp_path / "out", "diffusers")
    schedule = StableDiffusionXLPipeline.from_pretrained(out).scheduler.config
    assert schedule.prediction_type == "v_prediction"
    assert schedule.rescale_betas_zero_snr == zero
    assert opened(out).options.v_parameterization


def test_single_files_say_it_as_comfy_reads_it(predicting_v: tuple[Models, bool], tmp_path: Path) -> None:
    """By empty tensors: `v_pred`, and `ztsnr` where the last timestep is pure noise, by the file or by the training."""
    models, marked = predicting_v
    zero = models.process(NoiseConfig(), LossConfig()).scheduler_config().get("rescale_betas_zero_snr", False)
    assert zero == marked
    tensors = load(written(models, tmp_path / "a.safetensors"))
    assert tensors["v_pred"].numel() == 0 and ("ztsnr" in tensors) == zero
    trained = replace(models, noise=NoiseConfig(zero_terminal_snr=True))
    assert {"v_pred", "ztsnr"} <= load(written(trained, tmp_path / "b.safetensors")).keys()
    again = opened(tmp_path / "b.safetensors")
    assert again.options.v_parameterization
    assert again.process(NoiseConfig(), LossConfig()).scheduler_config()["rescale_betas_zero_snr"]


def test_noise_prediction_is_what_is_meant_else(single: Path) -> None:
    models = opened(single)
    assert not models.options.v_parameterization and opened(single, v_parameterization=True).options.v_parameterization
    with pytest.raises(UserError, match="zero_terminal_snr"):
        models.process(NoiseConfig(zero_terminal_snr=True), LossConfig())


# --- refused ---


def test_a_config_that_asks_for_another_net(folder: Path) -> None:
    edit(folder / "unet" / "config.json", act_fn="gelu", addition_time_embed_dim=128, attention_head_dim=4)
    with pytest.raises(UserError) as error:
        opened(folder)
    assert len(error.value.messages) == 3
    assert all("config.json" in message for message in error.value.messages)


@pytest.mark.parametrize(
    "told", [{"_class_name": "EDMDPMSolverMultistepScheduler"}, {"prediction_type": "sample"}], ids=str
)
def test_a_folder_of_another_process(folder: Path, told: dict[str, str]) -> None:
    """Playground v2.5 is of this architecture, and noised in another way."""
    edit(folder / "scheduler" / "scheduler_config.json", **told)
    with pytest.raises(UserError, match=r"scheduler_config\.json: .*only models of DDPM"):
        opened(folder)


def test_an_inpainting_model(tmp_path: Path) -> None:
    tensors = sdxl.single_file()
    tensors[FIRST] = torch.cat([tensors[FIRST], tensors[FIRST], tensors[FIRST][:, :1]], 1)
    with pytest.raises(UserError, match="the U-Net takes 9 channels"):
        opened(sdxl.put(tmp_path / "model.safetensors", tensors))


def test_a_unet_that_is_told_of_another_text_encoder(tmp_path: Path) -> None:
    tensors = sdxl.single_file()
    name = f"{PREFIX}label_emb.0.0.weight"
    tensors[name] = tensors[name][:, 8:].clone()
    with pytest.raises(UserError, match=r"takes 1656 numbers .* 128 of the pooled text and 6 x 256"):
        opened(sdxl.put(tmp_path / "model.safetensors", tensors))


# --- tokenizers ---


def test_each_text_encoder_has_its_own_padding(single: Path, tmp_path: Path) -> None:
    """A folder with a tokenizer alone is for both, and bigG is padded with the token 0 all the same."""
    encoders.clip_tokenizer().save_pretrained(tmp_path / "given")
    for models in (opened(single), opened(single, tokenizer=tmp_path / "given")):
        tokens = models.tokenize(["a cat"])
        end = models.tokenizers["clip_l"].eos_token_id
        first, second = (tokens[f"{name}_ids"][0, 0].tolist() for name in ("clip_l", "clip_g"))
        n = first.index(end)
        assert second[: n + 1] == first[: n + 1]
        assert (set(first[n:]), set(second[n + 1 :])) == ({end}, {0})


def test_vocabularies_go_with_the_model(single: Path, tmp_path: Path) -> None:
    again = opened(written(opened(single), tmp_path / "b" / "model.safetensors"))
    assert {name: t.get_vocab() for name, t in again.tokenizers.items()} == {
        name: t.get_vocab() for name, t in opened(single).tokenizers.items()
    }
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model.safetensors", "tokenizer", "tokenizer_2"}
