"""What Anima is told: captions as by the pipeline, of any length, as they are kept, and left out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import make_images
from tinies import anima, encoders, llms
from tinies.cases import Files
from torch import Tensor
from training import config

from sfumato import families
from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.families.anima.facts import Options
from sfumato.families.anima.net import ROWS
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.train import dist, run

QUOTES = "a sign \"red\", a sign 'red', a sign “red”, a sign «red»"
CAPTIONS = [QUOTES, "🐈 一只凶恶的狼", "red " * 500, ""]
"""Of four quote styles, emoji and Chinese, 2,000 characters, none."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return anima.write(tmp_path_factory.mktemp("model"))


def opened(files: Files, **options: Any) -> Models:
    told = Options(**{**files.options, **options})
    beside = str(files.model.parent)
    return loading.load(families.family("anima"), str(files.model), told, vae=files.vae, tokenizer=beside)


@pytest.fixture(scope="module")
def models(files: Files) -> Models:
    return opened(files)


@torch.no_grad()
def said(models: Models, captions: list[str]) -> dict[str, Tensor]:
    return dict(models.encode(models.tokenize(captions)))


def test_odd_and_long_captions_are_read_as_by_the_pipeline(models: Models) -> None:
    """512 is what is padded to, not where captions are cut."""
    for caption in CAPTIONS:
        wanted, found = anima.encoded(anima.pipeline(), [caption]), said(models, [caption])
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    assert said(models, ["red " * 700])["t5_ids"].shape[1] > ROWS


def test_captions_are_cut_where_it_is_asked_for_and_it_is_told(files: Files) -> None:
    models = opened(files, qwen3_max_token_length=20, t5_max_token_length=10)
    tokens = models.tokenize(["red " * 30])
    assert (tokens["qwen3"].shape[1], tokens["t5"].shape[1]) == (20, 10)
    assert tokens["t5"][0, -1] == encoders.t5_tokenizer().eos_token_id
    limits = {limit.encoder: limit for limit in models.tokenize_strategy.limits()}
    assert {name: (each.tokens, each.raised_by) for name, each in limits.items()} == {
        "Qwen3": (20, "qwen3_max_token_length"),
        "T5": (9, "t5_max_token_length"),
    }
    assert limits["Qwen3"].count(["red " * 30])[0] > 20


def test_a_caption_that_is_left_out_is_as_sd_scripts_has_it(models: Models) -> None:
    """States of zeros, hidden, and of T5's tokens the end mark alone: what the pipeline makes of an empty prompt."""
    found = said(models, ["a cat", ""])
    end = encoders.t5_tokenizer().eos_token_id
    assert not found["qwen3"][1].any() and not found["qwen3_mask"][1].any()
    assert found["t5_mask"][1].tolist() == [True] + [False] * (found["t5_ids"].shape[1] - 1)
    assert found["t5_ids"][1].tolist() == [end] + [0] * (found["t5_ids"].shape[1] - 1)


def test_kept_text_has_no_padding_and_whole_tokens(models: Models) -> None:
    """In 16 bits; T5's tokens stay whole numbers. What is kept of an empty caption is one token of T5."""
    strategy, cond = models.outputs, said(models, ["a cat", "", "red " * 300])
    entries = [strategy.entry(cond, i) for i in range(3)]
    for entry, caption in zip(entries, ["a cat", "", "red " * 300], strict=True):
        assert len(entry["qwen3"]) == len(llms.qwen_tokenizer()(caption).input_ids)
        assert entry["t5_ids"].tolist() == encoders.t5_tokenizer()(caption).input_ids
    assert strategy.dtype == torch.bfloat16
    joined = strategy.join(entries)
    assert joined["t5_ids"].dtype == torch.int64
    assert all(torch.equal(joined[name], cond[name]) for name in cond)
    alone = strategy.join(entries[1:2])
    assert alone["qwen3"].shape == (1, 1, llms.QWEN3_WIDTH) and not alone["qwen3_mask"].any()


@torch.no_grad()
def test_captions_are_dropped_alike_whether_text_is_kept_or_not(files: Files, tmp_path: Path) -> None:
    """sd-scripts drops kept captions for this family alone; here what is kept includes the empty caption."""
    images = make_images(tmp_path)
    subset = SubsetConfig(image_dir=str(images), caption_dropout_rate=0.5)
    data = DatasetConfig(subsets=(subset,), resolution=(64, 64), batch_size=8)
    counts = []
    for kept in (True, False):
        told = config(
            pretrained_model_name_or_path=str(files.model),
            vae=files.vae,
            output_dir=str(tmp_path / f"{kept}"),
            sample_sampler="euler",
            cache_text_encoder_outputs=kept,
            network_train_unet_only=True,
            family=Options(**files.options),
        )
        a_run = run.prepare(told, "network", (data,), dist.world(), 0.0)
        with a_run.log or nullcontext():
            (batch,) = next(iter(a_run.loader.epoch(0))).batches
        assert (batch.cond is None) != kept
        mask = batch.cond["t5_mask"] if kept else batch.tokens["t5_mask"]
        counts.append(mask.sum(1).tolist())
    assert counts[0] == counts[1]
    assert 0 < counts[0].count(1) < len(counts[0]), "some are dropped: the end mark alone is left of them"
