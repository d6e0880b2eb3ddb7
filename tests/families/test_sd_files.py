"""Checkpoints: single files and diffusers folders, in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from sfumato.config import LossConfig, NoiseConfig
from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.families.sd.facts import Options
from sfumato.families.sd.family import FAMILY, process
from sfumato.formats import files
from sfumato.formats.files import load, read_header, save
from sfumato.memory.checkpoint import checkpoint_blocks
from sfumato.models import loading
from sfumato.models.autoencoders import scaled, scaling_of, unscale
from sfumato.models.base import Models


def opened(path: Path, **options: object) -> Models:
    return loading.load(FAMILY, str(path), Options(**options), detect=detect_file)  # type: ignore[arg-type]


def written(
    models: Models, path: Path, layout: str = "single_file", dtype: torch.dtype | None = None, **more: object
) -> Path:
    loading.save(models, path, layout=layout, dtype=dtype, metadata={"modelspec.implementation": "sfumato 0"}, **more)  # type: ignore[arg-type]
    return path


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, t in a.items() if t.dtype != b[name].dtype or not torch.equal(t, b[name])]


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_comes_back_bit_for_bit(tmp_path: Path, v2: bool, dtype: torch.dtype) -> None:
    path = (tiny.tiny_sd2 if v2 else tiny.tiny_sd1)(tmp_path, dtype)
    models = opened(path)
    assert models.options.v2 is v2
    assert next(models.denoiser.parameters()).dtype == dtype
    out = written(models, tmp_path / "out" / "model.safetensors")
    assert_same(load(path), load(out))
    assert read_header(out).metadata["modelspec.implementation"] == "sfumato 0"


def test_what_was_only_run_in_another_format_is_written_as_it_was(tmp_path: Path) -> None:
    """A frozen text encoder run in bf16 keeps its fp16 values; the trained U-Net is written in its new format."""
    path = tiny.short_sd1(tmp_path, torch.float16)
    models = loading.load(FAMILY, str(path), Options(), dtype=torch.float32)
    models.encoders["clip_l"].to(torch.bfloat16)
    models.vae.to(torch.float32)
    models.denoiser.get_parameter("out.2.bias").data += 1
    before, after = load(path), load(written(models, tmp_path / "out" / "model.safetensors"))
    unet = {name for name in before if name.startswith("model.diffusion_model.")}
    # The average that the source kept of its U-Net goes: it is not that of the new one.
    others = {k: t for k, t in before.items() if k not in unet and not k.startswith("model_ema.")}
    assert_same(others, {k: t for k, t in after.items() if k not in unet})
    assert {after[name].dtype for name in unet} == {torch.float32}
    torch.testing.assert_close(
        after["model.diffusion_model.out.2.bias"], before["model.diffusion_model.out.2.bias"].float() + 1
    )


def test_save_in_another_format_and_with_other_values(tmp_path: Path) -> None:
    path = tiny.short_sd1(tmp_path)
    models = opened(path)
    average = {"denoiser": {"out.2.bias": torch.full((4,), 7.0)}}
    out = load(written(models, tmp_path / "out" / "model.ckpt", dtype=torch.float16, state=average))
    assert out["model.diffusion_model.out.2.bias"].tolist() == [7.0] * 4
    nets = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model.encoder.")
    assert {t.dtype for name, t in out.items() if name.startswith(nets)} == {torch.float16}
    assert out["alphas_cumprod"].dtype == torch.float32


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    models = opened(tiny.short_sd1(tmp_path))
    models.denoiser.get_parameter("out.2.bias").data[1] = 1e6
    with pytest.raises(UserError, match=r"out\.2\.bias"):
        written(models, tmp_path / "out" / "model.safetensors", dtype=torch.float16)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_early_single_files_keep_their_names(tmp_path: Path) -> None:
    tensors = {name.replace(".text_model.", "."): t for name, t in tiny.single_file(v2=False, short=True).items()}
    save(tmp_path / "early.safetensors", tensors, {})
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert_same(tensors, load(written(opened(tmp_path / "early.safetensors"), tmp_path / "out" / "model.safetensors")))


def test_pickled_checkpoints(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    torch.save({"state_dict": tiny.single_file(v2=False, short=True), "global_step": 3}, tmp_path / "model.ckpt")
    assert_same(
        tiny.single_file(v2=False, short=True),
        load(written(opened(tmp_path / "model.ckpt"), tmp_path / "out" / "model.safetensors")),
    )


@pytest.mark.parametrize("v2", [False, True])
def test_folders_of_diffusers_and_single_files_hold_the_same(tmp_path: Path, v2: bool) -> None:
    folder = (tiny.tiny_sd2_diffusers if v2 else tiny.tiny_sd1_diffusers)(tmp_path / "folder")
    models = opened(folder)
    assert models.source.layout == "diffusers"
    again = written(models, tmp_path / "again", "diffusers")
    theirs, ours = (StableDiffusionPipeline.from_pretrained(f) for f in (folder, again))
    for part in ("unet", "vae", "text_encoder"):
        assert_same(getattr(theirs, part).state_dict(), getattr(ours, part).state_dict())
    assert theirs.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    single = load(written(models, tmp_path / "single" / "model.safetensors"))
    expected = tiny.single_file(v2=v2)
    nets = [name for name in single if f"resblocks.{tiny.LAYERS}." not in name]
    assert_same({name: expected[name] for name in nets}, {name: single[name] for name in nets})
    assert_same(load_nets(opened(tmp_path / "single" / "model.safetensors")), load_nets(models))


def load_nets(models: Models) -> dict[str, Tensor]:
    return {f"{name}.{k}": t for name, net in models.nets().items() for k, t in net.state_dict().items()}


def test_a_folder_replaces_an_older_one_whole(tmp_path: Path) -> None:
    models = opened(tiny.short_sd1(tmp_path / "source"))
    written(models, tmp_path / "out", "diffusers")
    (tmp_path / "out" / "stale.json").write_text("")
    written(models, tmp_path / "out", "diffusers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert not (tmp_path / "out" / "stale.json").exists()


def test_a_folder_of_the_users_is_never_replaced_by_a_result(tmp_path: Path) -> None:
    models = opened(tiny.short_sd1(tmp_path / "source"))
    mine = {tmp_path / "photos" / "a.jpg", written(models, tmp_path / "model", "diffusers") / "notes.md"}
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(UserError, match="not sfumato's"):
            written(models, path.parent, "diffusers")
        assert path.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "photos", "source"]


@pytest.mark.skipif(os.name == "nt", reason="a file that is mapped cannot be cut there")
def test_a_base_model_that_changes_gives_no_mixed_result(tmp_path: Path) -> None:
    path = tiny.short_sd1(tmp_path)
    models = opened(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    for layout in ("single_file", "diffusers"):
        with pytest.raises(UserError, match="changed while it was in use"):
            written(models, tmp_path / "out.safetensors", layout)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


@pytest.mark.skipif(os.name == "nt", reason="a file that is mapped cannot be cut there")
def test_a_base_model_that_changes_while_a_result_is_written_gives_no_mixed_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.short_sd1(tmp_path)
    models, real = opened(path), files.serialise

    def cut(*args: Any) -> Iterator[Any]:
        yield from real(*args)
        os.truncate(path, 1000)

    monkeypatch.setattr(files, "serialise", cut)
    with pytest.raises(UserError, match="changed while it was in use"):
        written(models, tmp_path / "out.safetensors")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_what_save_precision_cannot_hold_is_told_not_saved(tmp_path: Path) -> None:
    models = opened(tiny.short_sd1(tmp_path))
    with torch.no_grad():
        next(models.denoiser.parameters()).view(-1)[0] = 1e6
    with pytest.raises(UserError, match=r"infinite values .*save_precision float16 may be too small"):
        written(models, tmp_path / "out.safetensors", dtype=torch.float16, trained=("denoiser",))
    assert not (tmp_path / "out.safetensors").exists()
    written(models, tmp_path / "out.safetensors", dtype=torch.bfloat16, trained=("denoiser",))


def test_the_prediction_of_a_folder_is_honoured(tmp_path: Path) -> None:
    models = opened(tiny.tiny_sd2_diffusers(tmp_path / "folder", "v_prediction"))
    assert models.options.v_parameterization
    assert process(models, NoiseConfig(), LossConfig()).scheduler_config()["prediction_type"] == "v_prediction"
    again = written(models, tmp_path / "again", "diffusers")
    assert json.loads((again / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_the_prediction_of_a_single_file_is_honoured(tmp_path: Path) -> None:
    path = tiny.tiny_sd2(tmp_path)
    assert not opened(path).options.v_parameterization
    save(path, load(path), {"modelspec.architecture": "stable-diffusion-v2-768-v"})
    assert opened(path).options.v_parameterization


def test_a_config_that_asks_for_another_net_is_refused(tmp_path: Path) -> None:
    folder = tiny.tiny_sd1_diffusers(tmp_path / "folder")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "act_fn": "gelu", "attention_head_dim": 4}))
    with pytest.raises(UserError) as error:
        opened(folder)
    assert len(error.value.messages) == 2
    assert "act_fn" in str(error.value)


def test_another_vae(tmp_path: Path) -> None:
    """A file with prefix, one without, a folder: each takes the place of the checkpoint's own, and is saved."""
    path = tiny.short_sd1(tmp_path / "model")
    other = tiny.parts(v2=False, seed=9, short=True).vae
    other.save_pretrained(tmp_path / "vae")
    prefixed = {k: t for k, t in tiny.single_file(v2=False, short=True).items() if k.startswith("first_stage_model.")}
    save(tmp_path / "with.safetensors", prefixed, {})
    save(
        tmp_path / "without.safetensors", {k.removeprefix("first_stage_model."): t + 1 for k, t in prefixed.items()}, {}
    )
    first = next(iter(prefixed))
    for name, value in (
        ("vae", None),
        ("with.safetensors", prefixed[first]),
        ("without.safetensors", prefixed[first] + 1),
    ):
        models = loading.load(FAMILY, str(path), Options(), vae=str(tmp_path / name))
        if value is None:
            assert_same(dict(models.vae.state_dict()), dict(other.state_dict()))
        else:
            out = load(written(models, tmp_path / "out" / "model.safetensors"))
            assert torch.equal(out[first], value)


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    models = opened(tiny.short_sd1(tmp_path / "a"))
    written(models, tmp_path / "b" / "model.safetensors")
    assert opened(tmp_path / "b" / "model.safetensors").tokenizers["clip_l"].get_vocab() == tiny.vocabulary()


def test_a_vocabulary_larger_than_the_text_encoder_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", tiny.single_file(v2=False, short=True), {})
    with pytest.raises(UserError, match="49408 tokens"):
        opened(tmp_path / "model.safetensors")


def test_options_that_the_model_contradicts(tmp_path: Path) -> None:
    path = tiny.short_sd1(tmp_path)
    with pytest.raises(UserError, match="v2"):
        opened(path, v2=True)
    with pytest.raises(UserError, match="clip_skip"):
        opened(path, clip_skip=4)
    inpainting = tiny.single_file(v2=False, short=True)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save(path, {**inpainting, name: inpainting[name].repeat(1, 2, 1, 1)}, {})
    with pytest.raises(UserError, match="8 channels"):
        opened(path)


@pytest.mark.parametrize("skip", [1, 2])
def test_gradients_reach_a_text_encoder_and_are_the_same_with_checkpointing(tmp_path: Path, skip: int) -> None:
    models = opened(tiny.short_sd1(tmp_path), clip_skip=skip)
    weight = models.encoders["clip_l"].get_parameter("text_model.encoder.layers.0.mlp.fc1.weight").requires_grad_()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def gradient() -> Tensor:
        cond = models.encode(models.tokenize(["a cat"]))
        (found,) = torch.autograd.grad(models.predict(x, torch.tensor([5]), cond).square().sum(), weight)
        return found

    plain = gradient()
    assert plain.abs().sum() > 0
    checkpoint_blocks([*FAMILY.blocks(models.denoiser), *FAMILY.encoder_blocks(models.encoders["clip_l"])])
    torch.testing.assert_close(gradient(), plain)


def test_scale_and_its_inverse(tmp_path: Path) -> None:
    models = opened(tiny.short_sd1(tmp_path))
    x = torch.ones(1, 4, 2, 2)
    assert scaled(x, scaling_of(models.vae)).unique().item() == pytest.approx(0.18215)
    torch.testing.assert_close(unscale(models.vae, scaled(x, scaling_of(models.vae))), x)
    assert replace(models.options, v2=None) == Options()
