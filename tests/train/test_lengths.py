"""Captions that are cut are counted, whatever reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from PIL import Image
from run_fixtures import make_images
from training import config

from sfumato.config import Config, DatasetConfig, SubsetConfig
from sfumato.data.plan import Plan, make_plan
from sfumato.data.store import FileIndex
from sfumato.data.strategies import Limit
from sfumato.families.flux.strategies import FluxTokenize
from sfumato.families.sd.strategies import SdTokenize
from sfumato.families.sd3.strategies import Sd3Tokenize
from sfumato.families.sdxl.strategies import SdxlTokenize
from sfumato.models.encoders import tokenizers
from sfumato.train import lengths, plan
from sfumato.train.run import cache

WORDS = Limit(
    encoder="CLIP", tokens=3, count=lambda texts: [len(text.split()) for text in texts], raised_by="max_token_length"
)


def planned(root: Path, *captions: str, **options: object) -> Plan:
    for i, caption in enumerate(captions):
        Image.new("RGB", (64, 64)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(caption, encoding="utf-8")
    subset = SubsetConfig(image_dir=str(root), **options)  # type: ignore[arg-type]
    return make_plan([DatasetConfig(subsets=(subset,), resolution=(64, 64))], FileIndex())


def test_long_captions_are_counted_and_shown_with_the_cure(tmp_path: Path) -> None:
    made = planned(tmp_path, "a b c", "a b c d", "a b c d e", "a b c d")
    text = "3 of 4 captions have more than the 3 tokens that CLIP reads: 2.png (5), 1.png (4), 3.png (4); max_token_length makes it take more"
    assert lengths.too_long(made, [WORDS]) == [text]
    assert lengths.too_long(made, []) == []


def test_what_is_dropped_or_moved_counts_whole_and_affixes_count(tmp_path: Path) -> None:
    made = planned(
        tmp_path, "a, b, {c|d e}", shuffle_caption=True, caption_tag_dropout_rate=0.9, caption_dropout_rate=1.0, enable_wildcard=True,
        token_warmup_step=9, caption_suffix="end",
    )  # fmt: skip
    assert "0.png (5)" in lengths.too_long(made, [WORDS])[0]


def test_thousands_of_captions_are_counted_in_portions(tmp_path: Path) -> None:
    seen: list[int] = []
    limit = Limit(encoder="T5", tokens=0, count=lambda texts: seen.append(len(texts)) or [1] * len(texts))
    made = planned(tmp_path, *map(str, range(7)))
    calls: list[tuple[int, int]] = []
    lengths.PORTION, before = 3, lengths.PORTION
    try:
        lengths.too_long(made, [limit, limit], lambda done, total: calls.append((done, total)))
    finally:
        lengths.PORTION = before
    assert seen == [3, 3, 1] * 2 and calls[-1] == (14, 14)


def test_each_family_counts_as_its_tokens_are_cut() -> None:
    clip = tokenizers.clip_tokenizer()
    sd, t5 = SdTokenize(clip, 150), clip  # any vocabulary stands in for T5's
    strategies = (
        sd,
        SdxlTokenize({"clip_l": sd, "clip_g": sd}),
        Sd3Tokenize({"clip_l": clip, "clip_g": clip}, t5, 20),
        FluxTokenize(clip, t5, 20),
    )
    found = [[(limit.encoder, limit.tokens) for limit in strategy.limits()] for strategy in strategies]
    assert found == [[("CLIP", 150)], [("CLIP", 150)], [("CLIP", 75), ("T5", 19)], [("CLIP", 75), ("T5", 19)]]
    text = ["cat " * 100]
    assert [limit.count(text) for strategy in strategies for limit in strategy.limits()] == [[100]] * 6
    assert SdTokenize(clip, 75, weighted=True).limits()[0].count(["(cat:1.3) [dog]"]) == [2]
    assert Sd3Tokenize({"clip_l": clip, "clip_g": clip}, None, 20).limits()[-1].encoder == "CLIP"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, tuple[DatasetConfig, ...]]:
    """A tiny model, and five images of which one has a caption that is too long for it."""
    root = tmp_path_factory.mktemp("long")
    images = make_images(root)
    (images / "3.txt").write_text("red " * 90)
    model = tiny.short_sd1(root / "model")
    settings = config(
        pretrained_model_name_or_path=str(model), output_dir=str(root / "out"), max_train_steps=1, network_dim=1,
        cache_text_encoder_outputs_to_disk=True, cache_dir=str(root / "cache"), network_train_unet_only=True,
    )  # fmt: skip
    return settings, (DatasetConfig(subsets=(SubsetConfig(image_dir=str(images)),), resolution=(64, 64)),)


def test_plan_says_which_captions_are_cut(run: tuple[Config, tuple[DatasetConfig, ...]]) -> None:
    assert "1 of 5 captions have more than the 75 tokens that CLIP reads: 3.png (" in "".join(
        plan.facts(run[0], "network", run[1])["notes"]
    )


def test_cache_says_it_when_captions_are_encoded_and_not_again(
    run: tuple[Config, tuple[DatasetConfig, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    cache(*run)
    assert "3.png (" in capsys.readouterr().err
    cache(*run)
    assert "3.png (" not in capsys.readouterr().err
