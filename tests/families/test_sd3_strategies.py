"""What Stable Diffusion 3 is told: text as the pipeline puts it together, with masks, with chance, and in its place in the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tinies import encoders, sd3
from tinies.cases import Files
from torch import Tensor

from sfumato.families.sd3.facts import Options
from sfumato.families.sd3.family import FAMILY
from sfumato.models import loading
from sfumato.models.base import Models, SampleInfo
from sfumato.tensors.random import SampleRandom

CAPTIONS = ["a cat on a mat", "", "red " * 30 + "end"]
COMPONENTS = ("clip_l", "clip_g", "t5")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return sd3.write("medium", tmp_path_factory.mktemp("model"))


def opened(files: Files, **options: Any) -> Models:
    return loading.load(
        FAMILY, str(files.model), Options(**{**files.options, **options}), tokenizer=str(files.model.parent)
    )


@torch.no_grad()
def said(models: Models, captions: list[str] = CAPTIONS) -> dict[str, Tensor]:
    return dict(models.encode(models.tokenize(captions)))


def told(
    models: Models, cond: Mapping[str, Tensor], keys: list[int] | None = None, size: tuple[int, int] = (64, 96)
) -> dict[str, Tensor]:
    """`keys`: of the samples while training; None: images are drawn. `size`: height, width."""
    b = len(cond["clip_l"])
    sizes = torch.tensor([[*size, 0, 0, *size]] * b)
    drawn = {} if keys is None else models.family.draw(models, sizes, SampleRandom(keys))
    return dict(models.condition(cond, SampleInfo(sizes=sizes, drawn=drawn)))


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- as the pipeline ---


@pytest.mark.parametrize("length", [256, 77, 20])
@torch.no_grad()
def test_text_is_put_together_as_by_the_pipeline(files: Files, length: int) -> None:
    models = opened(files, t5xxl_max_token_length=length)
    wanted = sd3.told(sd3.pipeline("medium"), CAPTIONS, length)
    found = told(models, said(models))
    assert found.keys() == {"context", "y"}
    for ours, theirs in zip((found["context"], found["y"]), wanted, strict=True):
        assert_close(ours, theirs)
    assert found["context"].shape == (3, 77 + length, sd3.CONTEXT)


@pytest.mark.parametrize("length", [256, 77])
@torch.no_grad()
def test_without_t5_zeros_stand_in_its_place_as_in_the_pipeline(tmp_path: Path, length: int) -> None:
    files = sd3.write("3.5_large", tmp_path)
    models = loading.load(
        FAMILY,
        str(files.model),
        Options(**files.options, t5xxl_max_token_length=length),
        vae=files.vae,
        tokenizer=str(tmp_path),
    )
    assert set(models.encoders) == {"clip_l", "clip_g"}
    assert "t5" not in models.outputs.fields
    found = told(models, said(models))
    for ours, theirs in zip(
        (found["context"], found["y"]), sd3.told(sd3.pipeline("3.5_large"), CAPTIONS, length), strict=True
    ):
        assert_close(ours, theirs)
    assert not found["context"][:, 77:].any()
    assert found["context"].shape[1] == 77 + length


# --- masks ---


def test_padding_is_content_unless_it_is_hidden(files: Files) -> None:
    plain, masked = said(opened(files)), said(opened(files, apply_lg_attn_mask=True, apply_t5_attn_mask=True))
    count = len(encoders.clip_tokenizer()(CAPTIONS[0]).input_ids)
    words = len(encoders.t5_tokenizer()(CAPTIONS[0]).input_ids)
    for name, n in (("clip_l", count), ("clip_g", count), ("t5", words)):
        assert plain[name][0, n:].abs().sum(-1).min() > 0
        assert not masked[name][0, n:].any()
        assert masked[name][0, :n].abs().sum(-1).min() > 0
    for name in ("clip_l", "clip_g"):
        # CLIP looks back alone, so that what stands before padding is the same.
        assert torch.equal(masked[name][0, :count], plain[name][0, :count])
        assert torch.equal(masked[f"{name}_pooled"], plain[f"{name}_pooled"])
    assert (masked["t5"][0, :words] - plain["t5"][0, :words]).abs().max() > 1e-3, (
        "T5 looks at padding where nothing hides it"
    )
    assert masked["t5_mask"].sum(1).tolist() == [
        len(encoders.t5_tokenizer()(caption).input_ids) for caption in CAPTIONS
    ]


@torch.no_grad()
def test_hidden_padding_is_that_of_a_caption_without_any(files: Files) -> None:
    models = opened(files, apply_t5_attn_mask=True)
    found = said(models)
    for i, caption in enumerate(CAPTIONS):
        ids = encoders.t5_tokenizer()(caption, return_tensors="pt").input_ids
        alone = sd3.t5()(ids).last_hidden_state[0]
        assert_close(found["t5"][i, : len(alone)], alone)


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_kept_comes_back_whole(files: Files, tmp_path: Path, masked: bool) -> None:
    """T5's rows are kept without hidden padding, in bf16, and come back at full length; padding that is content is kept as well."""
    models = opened(files, apply_t5_attn_mask=masked, apply_lg_attn_mask=masked)
    strategy, cond = models.outputs, said(models)
    entries = [strategy.entry(cond, i) for i in range(len(CAPTIONS))]
    used = [len(encoders.t5_tokenizer()(caption).input_ids) for caption in CAPTIONS] if masked else [256] * 3
    assert [len(entry["t5"]) for entry in entries] == used
    assert strategy.dtype == torch.bfloat16
    joined = strategy.join(entries)
    assert joined.keys() == cond.keys()
    assert all(torch.equal(joined[name], cond[name]) for name in cond)
    assert joined["t5"].shape[1] == 256


def test_the_length_stays_the_same_whatever_a_batch_holds(files: Files) -> None:
    """The transformer knows no mask: rows of zeros are seen, so their number must not go by the neighbours."""
    models = opened(files, apply_t5_attn_mask=True, t5xxl_max_token_length=40)
    strategy, cond = models.outputs, said(models)
    for i in range(len(CAPTIONS)):
        assert strategy.join([strategy.entry(cond, i)])["t5"].shape == (1, 40, sd3.CONTEXT)


def test_settings_say_what_the_result_depends_on(files: Files) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"t5xxl_max_token_length": 77},
        {"apply_lg_attn_mask": True},
        {"apply_t5_attn_mask": True},
    ]
    found = [str(opened(files, **change).tokenize_strategy.settings) for change in changes]
    assert len(set(found)) == len(changes)


# --- chance ---


RATES = {"clip_l": "clip_l_dropout_rate", "clip_g": "clip_g_dropout_rate", "t5": "t5_dropout_rate"}


def rows(context: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What each encoder says in what the transformer is told: (b, numbers)."""
    width = sd3.L_WIDTH
    return {
        "clip_l": torch.cat([context[:, :77, :width].flatten(1), y[:, :width]], 1),
        "clip_g": torch.cat([context[:, :77, width : sd3.POOLED].flatten(1), y[:, width:]], 1),
        "t5": context[:, 77:].flatten(1),
    }


@pytest.mark.parametrize("name", COMPONENTS)
def test_dropout_takes_one_encoder_from_some_samples(files: Files, name: str) -> None:
    models = opened(files, **{RATES[name]: 0.4})
    cond = {part: t[:1].expand(64, *t.shape[1:]) for part, t in said(models).items()}
    plain = rows(**told(models, cond))
    dropped = rows(**told(models, cond, list(range(64))))
    gone = ~dropped[name].any(1)
    assert 10 < int(gone.sum()) < 45
    for part, told_rows in dropped.items():
        kept = ~gone if part == name else torch.ones(64, dtype=torch.bool)
        assert torch.equal(told_rows[kept], plain[part][kept])


def test_dropouts_of_the_encoders_are_independent_and_go_by_the_sample_alone(files: Files) -> None:
    models = opened(files, clip_l_dropout_rate=0.5, clip_g_dropout_rate=0.5, t5_dropout_rate=0.5)
    cond = {part: t[:1].expand(64, *t.shape[1:]) for part, t in said(models).items()}
    together = rows(**told(models, cond, list(range(64))))
    gone = torch.stack([~together[part].any(1) for part in COMPONENTS])
    assert len(gone.unique(dim=1).T) == 8, "all that can happen does"
    alone = rows(**told(models, {part: t[:1] for part, t in cond.items()}, [17]))
    for part in COMPONENTS:
        assert torch.equal(alone[part], together[part][17:18])


def test_dropout_is_the_same_from_kept_outputs_and_leaves_drawn_images_alone(files: Files) -> None:
    models = opened(files, clip_l_dropout_rate=0.5, t5_dropout_rate=0.5, apply_t5_attn_mask=True)
    strategy, cond = models.outputs, said(models)
    kept = strategy.join([strategy.entry(cond, i) for i in range(len(CAPTIONS))])
    live, cached = (told(models, each, [1, 2, 3]) for each in (cond, kept))
    assert all(torch.equal(live[name], cached[name]) for name in live)
    certain = opened(files, clip_l_dropout_rate=1.0, clip_g_dropout_rate=1.0, t5_dropout_rate=1.0)
    assert not any(t.any() for t in told(certain, said(certain), [1, 2, 3]).values())
    drawn = told(certain, said(certain))
    assert all(torch.equal(t, told(opened(files), said(certain))[name]) for name, t in drawn.items())


# --- place ---


def test_some_images_lie_elsewhere_in_the_table(files: Files) -> None:
    models = opened(files, pos_emb_random_crop_rate=0.5)
    cond = {part: t[:1].expand(200, *t.shape[1:]) for part, t in said(models).items()}
    crops = told(models, cond, list(range(200)), (64, 96))["crop"]  # 4 x 6 patches in 12 x 12
    assert crops.min() == 0 and crops.amax(0).tolist() == [8, 6], "up to the edges"
    middle = (crops == torch.tensor([4, 3])).all(1)
    assert 70 < int(middle.sum()) < 130
    alone = told(models, {part: t[:1] for part, t in cond.items()}, [42], (64, 96))["crop"]
    assert torch.equal(alone, crops[42:43])
    assert "crop" not in told(models, cond, None), "not where images are drawn"
    assert "crop" not in told(opened(files), cond, list(range(200)))


@torch.no_grad()
def test_a_image_in_the_middle_is_as_without_a_crop(files: Files) -> None:
    """At a rate that never strikes the crops are those of the middle, for sizes of odd and even patches."""
    models = opened(files, pos_emb_random_crop_rate=1e-9)
    cond = said(models, ["a cat"])
    for size in ((64, 96), (80, 48), (192, 192)):
        x = torch.randn(1, 16, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([500.0])
        cropped = told(models, cond, [1], size)
        assert "crop" in cropped
        assert torch.equal(
            models.predict(x, t, cropped),
            models.predict(x, t, told(models, cond, None)),
        )
