"""Whole runs with streamed blocks write what they write without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from racing import Racing
from runs.test_same import assert_same, stop_after
from training import Train, config

from sfumato.errors import UserError
from sfumato.formats.files import load
from sfumato.sampling.prompts import Prompt
from sfumato.tools.merge import Merging, merge
from sfumato.train import swapping
from sfumato.train.check import check
from sfumato.train.pipeline import Pipeline

EVERY = {"blocks_to_swap": 11, "text_encoder_blocks_to_swap": 2}
"""All blocks of the tiny model come and go."""


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[Racing]:
    """What runs stream to."""
    made = list[Racing]()

    def backend(*_: Any) -> tuple[Racing, bool]:
        made.append(Racing(seed=len(made)))
        return made[-1], True

    monkeypatch.setattr(swapping, "backend", backend)
    return made


def test_an_adapter_is_the_same(train: Train, cards: list[Racing], tmp_path: Path) -> None:
    """Trained with sample images between the steps, and with a state taken up."""
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1")
    settings: dict[str, Any] = {
        "sample_prompts": str(tmp_path / "prompts.txt"),
        "sample_every_n_steps": 1,
        "network_args": ("rank_dropout=0.2",),
    }
    plain = train("plain", max_train_steps=2, **settings)
    stop_after(train, 1, **settings, **EVERY)
    parts = train("parts", max_train_steps=2, resume="auto", gradient_checkpointing=True, **settings, **EVERY)
    assert_same(plain / "out.safetensors", parts / "out.safetensors")
    pictures = [[path.read_bytes() for path in sorted((run / "sample").glob("*.png"))] for run in (plain, parts)]
    assert pictures[0] and pictures[0] == pictures[1]
    assert all(card.loads and not card.stores for card in cards) and len(cards) == 4
    assert all(card.finished for card in cards), "copies may be on their way when a training is over"
    assert any(t.any() for name, t in load(parts / "out.safetensors").items() if "lora_up" in name)


def test_a_whole_model_is_the_same(train: Train, cards: list[Racing]) -> None:
    settings: dict[str, Any] = {
        "method": "full", "train_text_encoder": True, "ema_decay": 0.5, "max_grad_norm": 0.1,
        "optimizer_type": "AdamWScheduleFree",
        "gradient_accumulation_steps": 2, "cache_latents": True,
        "blockwise_fused_optimizers": True, "optimizer_state_on_cpu": True,
    }  # fmt: skip
    plain = train("plain", max_train_steps=2, **settings)
    stop_after(train, 1, **settings, **EVERY)
    parts = train("parts", max_train_steps=2, resume="auto", **settings, **EVERY)
    assert_same(plain / "out.safetensors", parts / "out.safetensors")
    assert all(card.stores for card in cards) and len(cards) == 4


def test_a_quantised_streamed_run_that_learns_nothing_leaves_the_model_as_it_was(
    train: Train, cards: list[Racing], model: Path
) -> None:
    """Its rate is too small for any number: merged, the adapter changes no bit."""
    settings = {"learning_rate": 1e-30, "max_train_steps": 2, "quantize": "int8", "network_train_unet_only": True}
    result = train("out", **settings, blocks_to_swap=6, gradient_checkpointing=True) / "out.safetensors"
    assert cards[0].loads and any(t.any() for name, t in load(result).items() if "lora_up" in name)
    merged = result.with_name("merged.safetensors")
    merge(Merging(model=model, adapters=[(result, 1.0)], out=merged))
    assert_same(model, merged)


def test_images_are_the_same(model: Path, cards: list[Racing]) -> None:
    """Nets that leave the device otherwise stay where they are streamed."""
    prompts = [Prompt(prompt="a cat", width=64, height=64, sample_steps=2, seed=1)]
    drawn = []
    for settings in ({}, {"blocks_to_swap": 6}):
        pipeline = Pipeline.of(
            config(pretrained_model_name_or_path=str(model), **settings), torch.device("cpu"), offload=True
        )
        drawn += pipeline.sample(prompts)
        pipeline.models.denoiser.to("cpu")
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert len(cards) == 1 and cards[0].loads


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("network", {"blocks_to_swap": 12}, "blocks_to_swap 12: this model has 12 blocks, and one must be on the device; choose 1 to 11"),
        ("network", {"double_blocks_to_swap": 1}, "double_blocks_to_swap 1: this model has no double_blocks"),
        ("network", {"text_encoder_blocks_to_swap": 3}, "choose 1 to 2"),
        ("full", {"blocks_to_swap": 1}, "set fused_backward_pass or blockwise_fused_optimizers, and optimizer_state_on_cpu"),
        ("full", {"blocks_to_swap": 1, "fused_optimizer_groups": 2, "optimizer_state_on_cpu": True}, "set fused_backward_pass"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_weights_are_read(
    model: Path, tmp_path: Path, method: Any, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        check(config(pretrained_model_name_or_path=str(model), output_dir=str(tmp_path), **settings), method, ())
