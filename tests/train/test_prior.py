"""Samples whose target is what the model predicts without its adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
from torch import Tensor

from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.tensors.random import generator
from sfumato.train.loop import Run
from sfumato.train.plan import folder_rows

KEPT = {"custom_attributes": {"diff_output_preservation": True}}
ENCODED = {"network_train_unet_only": False}
"""Text encoders have adapters too, which the base model's captions must not see."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared.folder(tmp_path_factory.mktemp("prior"))


def moved(a_run: Run) -> Run:
    """With adapters that change something."""
    with torch.no_grad():
        for name, p in a_run.trainable.weights().items():
            p.add_(torch.randn(p.shape, generator=generator(1, name)) * 0.3)
    return a_run


def first(a_run: Run) -> Batch:
    return next(next(iter(a_run.loader.epoch(0))).batches)


def error(a_run: Run, batch: Batch, *, plain: bool) -> tuple[Tensor, Tensor]:
    """What is predicted, with the adapter or without, and the noised sample's own target."""
    models, trainable = a_run.training_step.unowned
    trainable.on_batch(batch)
    noised = a_run.training_step.process.noise(models.scaled(a_run.training_step.latents(batch)), batch.drawn)
    if plain:
        trainable.remove()
    with torch.no_grad():
        return models.predict(noised.x, noised.t, models.encode(batch.tokens)), noised.target


def test_the_target_is_what_the_model_predicts_without_the_adapter(folder: Path) -> None:
    a_run = prepared.prepare(folder, subset=KEPT, cache_latents=True, **ENCODED)
    batch = first(a_run)
    assert batch.preserve is not None and batch.preserve.tolist() == [1, 1]
    assert not a_run.training_step.losses(batch).any()  # nothing is learnt yet
    found = a_run.training_step.losses(first(moved(a_run)))
    mixed = a_run.training_step.losses(replace(batch, preserve=torch.tensor([0.0, 1.0])))
    ours, target = error(a_run, batch, plain=False)
    theirs, _ = error(a_run, batch, plain=True)
    expected = (ours - theirs).square().flatten(1).mean(1)
    torch.testing.assert_close(found.detach(), expected)
    usual = (ours - target).square().flatten(1).mean(1)
    torch.testing.assert_close(mixed.detach(), torch.stack([usual[0], expected[1]]))
    assert (expected > 1e-6).all()


def test_where_a_mask_takes_the_weight_the_model_stays_as_it_is(folder: Path) -> None:
    settings: dict[str, Any] = {"masked_loss": True, "masked_prior_weight": 0.5, "cache_latents": True, **ENCODED}
    a_run = moved(prepared.prepare(folder, subset={"alpha_mask": True}, **settings))
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :4] = 1
    batch = replace(first(a_run), mask=mask)
    found = a_run.training_step.losses(batch)
    ours, target = error(a_run, batch, plain=False)
    theirs, _ = error(a_run, batch, plain=True)
    weighed = (ours - target).square() * mask + (ours - theirs).square() * (1 - mask) * 0.5
    torch.testing.assert_close(found.detach(), weighed.flatten(1).mean(1))


def test_each_image_comes_again_under_the_class(folder: Path) -> None:
    a_run = prepared.prepare(
        folder, prior_preservation_class="drawing", prior_loss_weight=0.25, cache_text_encoder_outputs=True,
        cache_latents=True, subset={"caption_prefix": "sks", "num_repeats": 2},
    )  # fmt: skip
    batches = [batch for step in a_run.loader.epoch(0) for batch in step.batches]
    rows = sorted(
        (caption, float(weight), 0.0 if batch.preserve is None else float(batch.preserve[i]))
        for batch in batches
        for i, (caption, weight) in enumerate(zip(batch.captions, batch.weight, strict=True))
    )
    ours = [("sks picture 0", 1.0, 0.0), ("sks picture 1", 1.0, 0.0)]
    assert rows == sorted([*ours, *ours, *[("drawing", 0.25, 1.0)] * 4])
    assert a_run.plan.train_samples == a_run.plan.reg_samples == 4
    assert [row[2] for row in folder_rows(a_run.plan)] == ["training", "preserved"]


def test_a_model_that_changes_itself_has_no_prediction_of_before(folder: Path) -> None:
    with pytest.raises(UserError, match=r"images: custom_attributes\.diff_output_preservation: only an adapter can be"):
        prepared.prepare(folder, "full", subset=KEPT)
