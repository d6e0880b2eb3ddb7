"""Chroma trains what is asked for: adapters on T5, cut layers, low precision; diffusers' pipeline samples the same with the result."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline
from test_families import prepared, says, states, trained
from tinies.cases import Files
from tinies.chroma import CASES, pipeline, true_mask
from torch import Tensor
from training import config

from sfumato.adapters.insert import from_state
from sfumato.errors import UserError
from sfumato.formats.files import load, read_header
from sfumato.models.base import Models
from sfumato.train.trainables import Adapters, Full, read_adapter

(CASE,) = CASES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return CASE.write(tmp_path_factory.mktemp("model"))


def adapted(files: Files, images: Path, out: Path, **settings: Any) -> tuple[Adapters, Models, Path]:
    """An adapter trained for three steps and saved."""
    a_run = prepared(CASE, files, images, out, "network", **settings)
    assert isinstance(a_run.trainable, Adapters)
    models = trained(a_run)
    a_run.save_result(out / "out.safetensors", 3, 0)
    a_run.trainable.train(False)
    return a_run.trainable, models, out / "out.safetensors"


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
def test_adapters_on_t5_where_they_are_asked_for(files: Files, images: Path, tmp_path: Path, dialect: str) -> None:
    before = states(CASE.models(files))
    trainable, models, path = adapted(files, images, tmp_path, network_args=("train_t5xxl=True",), dialect=dialect)
    assert trainable.trained == ("denoiser", "t5xxl")
    after = states(models)
    assert all(torch.equal(after[name], t) for name, t in before.items())
    by_path = trainable.network.by_path()
    assert {component for component, _ in by_path} == {"denoiser", "t5xxl"}
    assert all(adapter.lora_up.weight.any() for adapter in by_path.values())  # type: ignore[union-attr]
    starts = {
        "kohya": ("lora_unet_", "lora_te1_"),
        "comfy": ("diffusion_model.", "text_encoders.t5xxl.transformer.encoder."),
    }[dialect]
    tensors = load(path)
    assert all(any(name.startswith(start) for name in tensors) for start in starts)
    assert all(name.startswith(starts) for name in tensors)
    fresh = CASE.models(files)
    plain = says(fresh)
    from_state(fresh.nets(), read_adapter(fresh, path)).eval()
    torch.testing.assert_close(says(fresh), says(models), atol=1e-6, rtol=1e-6)
    assert (says(fresh) - plain).abs().max() > 1e-4


def test_the_text_encoder_alone(files: Files, images: Path, tmp_path: Path) -> None:
    settings = {"network_train_text_encoder_only": True}
    trainable, _, _ = adapted(files, images, tmp_path / "t5", network_args=("train_t5xxl=True",), **settings)
    assert trainable.trained == ("t5xxl",)
    with pytest.raises(UserError, match="nothing is left to train"):
        prepared(CASE, files, images, tmp_path / "nothing", "network", **settings)


@pytest.mark.parametrize("args", [(), ("split_qkv=True",)], ids=["fused", "split"])
def test_diffusers_pipeline_reads_the_adapter(
    files: Files, images: Path, tmp_path: Path, args: tuple[str, ...]
) -> None:
    """Through `ChromaPipeline`'s own reader."""
    _, models, path = adapted(files, images, tmp_path, network_args=args, dialect="peft", learning_rate=0.02)
    model = deepcopy(pipeline().transformer)
    tensors = ChromaPipeline.lora_state_dict(str(path))
    model.load_lora_adapter(tensors, prefix="transformer")
    x, t5 = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3, 96)
    with torch.no_grad():
        ours = models.denoiser(x, torch.tensor([0.3]), t5)
        theirs, plain = (said_by_diffusers(net, x, t5) for net in (model, pipeline().transformer))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - plain).abs().max() > 1e-2


def said_by_diffusers(model: Any, x: Tensor, t5: Tensor) -> Tensor:
    b, _, h, w = x.shape
    ids = ChromaPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)
    with true_mask(model):
        prediction = model(
            hidden_states=ChromaPipeline._pack_latents(x, *x.shape),
            encoder_hidden_states=t5,
            timestep=torch.tensor([0.3]),
            img_ids=ids,
            txt_ids=torch.zeros(t5.shape[1], 3),
            attention_mask=torch.ones(b, t5.shape[1] + len(ids)),
        ).sample
    return ChromaPipeline._unpack_latents(prediction, h * 8, w * 8, 8)


@pytest.mark.parametrize(
    "settings", [{"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "full_bf16": True}], ids=["mixed", "full"]
)
def test_bf16(files: Files, images: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    trainable, _, path = adapted(files, images, tmp_path, cache_text_encoder_outputs=True, **settings)
    assert all(t.isfinite().all() for t in load(path).values())
    assert all(adapter.lora_up.weight.any() for adapter in trainable.network.by_path().values())  # type: ignore[union-attr]


def test_the_net_that_makes_modulations_is_left_out_of_whole_models(files: Files) -> None:
    models = CASE.models(files)
    names = {f"denoiser.{name}" for name, _ in models.denoiser.named_parameters()}
    assert (
        set(Full(models, config()).weights())
        == {name for name in names if "distilled_guidance_layer" not in name}
        < names
    )


def test_the_result_says_what_it_is_of(files: Files, images: Path, tmp_path: Path) -> None:
    metadata = read_header(adapted(files, images, tmp_path)[2]).metadata
    wanted = {
        "modelspec.architecture": "chroma/lora",
        "ss_base_model_version": "chroma",
        "ss_model_type": "chroma",
        "ss_timestep_sampling": "sigmoid",
        "ss_model_prediction_type": "raw",
        "ss_guidance_scale": "0.0",
        "ss_apply_t5_attn_mask": "True",
        "ss_t5xxl_max_token_length": "512",
    }
    assert {name: metadata.get(name) for name in wanted} == wanted
