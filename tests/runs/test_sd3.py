"""Runs of Stable Diffusion 3: what is refused early, rates of single encoders, and what chance does while training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import make_images
from runs.test_families import changed, prepared, states, trained
from tinies import sd3
from tinies.cases import Files
from training import config

from sfumato.config import Config, DatasetConfig, Method, SubsetConfig
from sfumato.errors import UserError
from sfumato.families.sd3 import family
from sfumato.families.sd3.facts import Options
from sfumato.families.sd3.family import FAMILY
from sfumato.models import loading
from sfumato.train import caching, dist, loop, run

CASE = next(case for case in sd3.CASES if case.variant == "medium")
Prepare = Callable[..., loop.Run]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return CASE.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prepare(files: Files, images: Path, tmp_path: Path) -> Prepare:
    def go(method: Method = "network", **settings: Any) -> loop.Run:
        return prepared(CASE, files, images, tmp_path / "out", method, **settings)

    return go


# --- refused before the first step ---


def test_images_larger_than_the_table_are_reported_before_anything_is_encoded(
    files: Files, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded(*_: Any, **__: Any) -> Any:
        raise AssertionError("an image was encoded")

    monkeypatch.setattr(caching, "cache_latents", encoded)
    made: Config = config(pretrained_model_name_or_path=str(files.model), cache_latents=True, family=Options())
    large = DatasetConfig(subsets=(SubsetConfig(image_dir=str(images)),), resolution=(192, 208))
    with pytest.raises(UserError) as error:
        run.prepare(made, "network", (large,), dist.world(), 0.0)
    assert error.value.messages == (
        "dataset 1: 192 x 208 pixels are too large for this model, which takes at most 192 x 192; lower its resolution or max_bucket_reso",
    )


def test_prompts_larger_than_the_table_are_reported_before_the_first_step(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64\na dog --w 208 --h 64\n")
    with pytest.raises(
        UserError,
        match="the prompt 'a dog': 208 x 64 pixels are too large for this model, which takes at most 192 x 192",
    ):
        prepare(sample_prompts=str(tmp_path / "prompts.txt"), sample_every_n_steps=1)


def test_the_largest_sizes_of_the_real_models() -> None:
    class Net:
        largest = 2 * 192

    class ComponentWeights:
        denoiser = Net()

    assert FAMILY.largest is not None and FAMILY.largest(ComponentWeights()) == 3072  # type: ignore[arg-type]


def test_a_sampler_of_older_models_is_reported_before_the_first_step(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --ss ddim\n")
    with pytest.raises(UserError, match=r"sample_sampler ddim: Stable Diffusion 3 or 3\.5 is sampled with euler"):
        prepare(sample_prompts=str(tmp_path / "prompts.txt"), sample_every_n_steps=1)


def test_an_adapter_on_t5_in_diffusers_names_is_reported_before_the_first_step(prepare: Prepare) -> None:
    with pytest.raises(UserError, match=r"peft.* no names for t5xxl"):
        prepare(network_args=("train_t5xxl=True",), dialect="peft")


# --- what is trained ---


@pytest.mark.parametrize(
    ("settings", "moving"),
    [
        ({"learning_rate_te2": 0.0}, {"clip_l"}),
        ({"learning_rate_te1": 0.0}, {"clip_g"}),
        ({"learning_rate_te1": 0.0, "train_t5xxl": True}, {"clip_g", "t5xxl"}),
    ],
)
def test_a_rate_of_0_freezes_an_encoder(prepare: Prepare, settings: Mapping[str, Any], moving: set[str]) -> None:
    a_run = prepare("full", train_text_encoder=True, options=settings)
    before = states(a_run.trainable.models)  # type: ignore[attr-defined]
    moved = {name.partition(".")[0] for name in changed(before, states(trained(a_run)))}
    assert moved == {"denoiser", *moving}


def rates(a_run: loop.Run) -> dict[str, float]:
    """Of a run that is not begun."""
    with a_run.log or nullcontext():
        return {group.name: group.lr for group in a_run.trainable.groups()}


def test_encoders_have_rates_of_their_own(prepare: Prepare) -> None:
    a_run = prepare("full", train_text_encoder=True, options={"learning_rate_te1": 1e-5}, learning_rate_te=2e-5)
    assert rates(a_run) == {"denoiser": 1e-3, "clip_l": 1e-5, "clip_g": 2e-5}


def test_adapters_have_the_rates_of_kohyas_order(prepare: Prepare) -> None:
    a_run = prepare(text_encoder_lr=(1e-5, 2e-5, 3e-5), network_args=("train_t5xxl=True",))
    assert rates(a_run) == {"denoiser": 1e-3, "clip_l": 1e-5, "clip_g": 2e-5, "t5xxl": 3e-5}


def losses(files: Files, images: Path, out: Path, *, cached: bool, **options: Any) -> list[float]:
    """Of two steps."""
    kept = {"cache_text_encoder_outputs": cached, "network_train_unet_only": True}
    trained(prepared(CASE, files, images, out, "network", max_train_steps=2, options=options, **kept))
    return [json.loads(line)["loss"] for line in (out / "out.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(files: Files, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a live run without options."""
    where = tmp_path_factory.mktemp("plain")
    return losses(files, make_images(where), where / "out", cached=False)


@pytest.mark.parametrize(
    "options",
    [
        {"pos_emb_random_crop_rate": 1.0},
        {"enable_scaled_pos_embed": True},
        {"clip_l_dropout_rate": 1.0},
        {"clip_g_dropout_rate": 1.0},
        {"t5_dropout_rate": 1.0},
        {"apply_lg_attn_mask": True},
        {"apply_t5_attn_mask": True},
        {"t5xxl_max_token_length": 77},
        {"training_shift": 1.0},
        {"weighting_scheme": "uniform"},
        {"timestep_sampling": "sigmoid"},
        {"model_prediction_type": "sigma_scaled"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_user_sets_acts(
    files: Files, images: Path, tmp_path: Path, plain: list[float], options: dict[str, Any]
) -> None:
    """Live and cached alike: the same loss, up to what 16 bits keep, and another than without the option."""
    live, cached = (losses(files, images, tmp_path / str(kept), cached=kept, **options) for kept in (False, True))
    assert live == pytest.approx(cached, rel=2e-3)
    assert live != pytest.approx(plain, rel=1e-5), "two live runs without it would be equal to the last bit"


def test_cached_runs_equal_live_ones_in_every_weight_where_nothing_is_rounded(
    files: Files, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropouts, masks and crops go by the sample: with outputs kept in fp32 the very same weights come out."""
    exact = replace(FAMILY, outputs=lambda models: replace(family.outputs_strategy(models), dtype=torch.float32))
    monkeypatch.setattr(family, "FAMILY", exact)
    options = {
        "clip_l_dropout_rate": 0.5,
        "t5_dropout_rate": 0.5,
        "apply_t5_attn_mask": True,
        "pos_emb_random_crop_rate": 0.5,
    }
    results = []
    for cached in (False, True):
        # Not Adam: it divides by a gradient's own size, so that a processor's last bit may be as much as the step.
        settings = {
            "optimizer_type": "SGDNesterov",
            "learning_rate": 1.0,
            "network_train_unet_only": True,
            "options": options,
        }
        a_run = prepared(
            CASE, files, images, tmp_path / str(cached), "network", cache_text_encoder_outputs=cached, **settings
        )
        start = {name: p.detach().clone() for name, p in a_run.trainable.weights().items()}
        trained(a_run)
        results.append({name: p.detach().clone() for name, p in a_run.trainable.weights().items()})
    assert results[0].keys() == results[1].keys()
    moved = []
    for name, p in results[0].items():
        torch.testing.assert_close(results[1][name], p, atol=1e-6, rtol=1e-5)
        moved.append((p - start[name]).abs().max())
    assert max(moved) > 1e-3


def test_a_bundle_trained_whole_keeps_its_encoders(prepare: Prepare, files: Files, tmp_path: Path) -> None:
    """What is saved of a bundle is a bundle, and says the same when it is read again."""
    a_run = prepare("full", train_text_encoder=True)
    models = trained(a_run)
    a_run.save_result(tmp_path / "out.safetensors", 3, 0)
    again = loading.load(FAMILY, str(tmp_path / "out.safetensors"), Options(), tokenizer=str(files.model.parent))
    assert set(again.encoders) == {"clip_l", "clip_g", "t5xxl"}
    assert not changed(states(models), states(again))
