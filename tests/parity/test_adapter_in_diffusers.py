"""An adapter that we trained and saved does the same in diffusers' own pipeline as in ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from training import Train, config

from sfumato.formats.files import load
from sfumato.sampling.prompts import Prompt
from sfumato.sampling.sample import sample_latents
from sfumato.train.pipeline import Pipeline

PROMPT = Prompt(prompt="image 1, red", negative_prompt="blue", width=64, height=64, sample_steps=2, scale=5.0, seed=3)
NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all blocks, for it is the net's names that are tried."""
    return tiny.tiny_sd1(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def drawer(model: Path) -> Pipeline:
    """Our model, to be left as it is."""
    return Pipeline.of(config(pretrained_model_name_or_path=str(model)), torch.device("cpu"))


def ours(drawer: Pipeline) -> torch.Tensor:
    return sample_latents(drawer.models, [PROMPT], process=drawer.process, sampler="ddim", noise=NOISE)[0]


@pytest.fixture(scope="module")
def plain(drawer: Pipeline) -> torch.Tensor:
    return ours(drawer)


def theirs(adapter: Path | None, noise: torch.Tensor) -> torch.Tensor:
    """The latents of diffusers' StableDiffusionPipeline with the adapter file loaded by its own loader."""
    pipeline = tiny.pipeline(v2=False)
    pipeline.set_progress_bar_config(disable=True)
    if adapter:
        pipeline.load_lora_weights(str(adapter))
    try:
        return pipeline(
            PROMPT.prompt,
            negative_prompt=PROMPT.negative_prompt,
            latents=noise,
            width=64,
            height=64,
            num_inference_steps=PROMPT.sample_steps,
            guidance_scale=PROMPT.scale,
            output_type="latent",
        ).images
    finally:
        if adapter:
            pipeline.unload_lora_weights()


DORA = {"network_module": "dora", "network_args": ("conv_dim=2",)}


@pytest.mark.parametrize(("dialect", "kind"), [("kohya", {}), ("peft", {}), ("peft", DORA)])
def test_the_same_latents(
    train: Train, drawer: Pipeline, plain: torch.Tensor, dialect: str, kind: dict[str, Any]
) -> None:
    """DoRA in PEFT's names alone: diffusers drops the magnitudes of others, with a warning."""
    options = {"dialect": dialect, "network_alpha": 1.0, "learning_rate": 4e-2, "max_train_steps": 3, **kind}
    adapter = train("a", **options) / "out.safetensors"
    with drawer.adapted(adapter):
        adapted = ours(drawer)
    assert (adapted - plain).abs().max() > 0.01, "the adapter must do something, or this test proves nothing"
    torch.testing.assert_close(adapted, theirs(adapter, NOISE)[0], rtol=0, atol=1e-3)


def test_every_key_is_used(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers puts each pair of our file into a layer: none is left over, none is missing."""
    adapter = train("a", max_train_steps=1) / "out.safetensors"
    pipeline = tiny.pipeline(v2=False)
    pipeline.load_lora_weights(str(adapter), adapter_name="ours")
    try:
        inside: Mapping[str, int] = {
            part: sum("lora_A.ours.weight" in name for name, _ in net.named_parameters())
            for part, net in (("lora_unet", pipeline.unet), ("lora_te", pipeline.text_encoder))
        }
    finally:
        pipeline.unload_lora_weights()
    names = [name for name in load(adapter) if name.endswith("lora_down.weight")]
    assert inside == {part: sum(name.startswith(part) for name in names) for part in inside}
    assert min(inside.values()) > 0
