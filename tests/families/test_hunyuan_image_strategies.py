"""What HunyuanImage-2.1 is told of captions, with the vocabularies that it has: as by diffusers' pipeline, or said to be cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import HunyuanImagePipeline
from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text
from tinies import hunyuan_image, llms

from sfumato.families.hunyuan_image import strategies
from sfumato.families.hunyuan_image.strategies import (
    DROPPED,
    GLYPHS_LENGTH,
    LENGTH,
    OUTPUTS,
    TEMPLATE,
    HunyuanEncode,
    HunyuanTokenize,
    quoted,
)
from sfumato.models.base import Models
from sfumato.models.encoders.tokenizers import byt5_vocabulary, fingerprint, qwen_vocabulary

CAPTIONS = {
    "double quotes": 'a sign with "Hello, world" and "42"',
    "single quotes": "it reads 'open' in the dog's window and 'closed'",
    "curly quotes": "“Grand Hotel” stands above ‘vacancy’, “\n” is no text of one line",
    "all of them": "‘a’ “b” \"c\" 'd' “e”",
    "nothing in quotes": 'nothing: "" and “”',
    "one quote": 'the size is 5" and more',
    "none": "a cat on a mat",
    "empty": "",
    "emoji": 'a mug that says "🍕 & 👩‍🚀"',
    "chinese": "夜晚的街道，霓虹灯招牌写着“欢迎光临”，旁边是‘茶馆’",
    "braces": 'a {cat} with "{}" on it',
    "long": "a red cat and a 'blue' dog, " * 72,
    "long in quotes": 'a page that reads "' + "lorem ipsum " * 30 + '"',
}


@pytest.fixture(scope="module")
def strategy() -> HunyuanTokenize:
    return HunyuanTokenize(qwen_vocabulary(None), byt5_vocabulary(None))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    case = hunyuan_image.CASES[0]
    return case.models(case.write(tmp_path_factory.mktemp("model")))


def test_what_is_in_quotes_is_found_as_by_the_pipeline() -> None:
    for caption in CAPTIONS.values():
        assert (quoted(caption) or None) == extract_glyph_text(caption)
    assert quoted(CAPTIONS["all of them"]) == 'Text "d". Text "c". Text "a". Text "b". Text "e". '


class Heard:
    """Stands for a text encoder, and keeps the tokens that it is given."""

    dtype = torch.float32

    def __call__(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        self.ids, self.mask = input_ids, attention_mask.bool()
        states = torch.zeros(*input_ids.shape, 2)
        return type("Out", (tuple,), {"hidden_states": [states] * 4})([states])


@pytest.mark.parametrize("name", CAPTIONS)
def test_tokens_are_the_pipelines(strategy: HunyuanTokenize, name: str) -> None:
    """Captions of all kinds, through the published vocabularies; what is longer is cut where the pipeline cuts it, and
    said to be."""
    caption, heard = CAPTIONS[name], {"qwen": Heard(), "byt5": Heard()}
    pipe: Any = SimpleNamespace(tokenizer_max_length=LENGTH)
    HunyuanImagePipeline._get_qwen_prompt_embeds(
        pipe, strategy.qwen, heard["qwen"], [caption], torch.device("cpu"), tokenizer_max_length=LENGTH
    )
    tokens = strategy.tokenize([caption])
    used = heard["qwen"].mask[0]
    assert tokens["text_mask"].all() and torch.equal(tokens["text"][0], heard["qwen"].ids[0, used])
    glyphs = extract_glyph_text(caption)
    if glyphs is None:
        assert tokens["glyphs"].shape == (1, 0)
    else:
        HunyuanImagePipeline._get_byt5_prompt_embeds(pipe, strategy.byt5, heard["byt5"], glyphs, torch.device("cpu"))
        assert torch.equal(tokens["glyphs"][0], heard["byt5"].ids[0, heard["byt5"].mask[0]])
    qwen, byt5 = strategy.limits()
    cut = {limit.encoder: limit.count([caption])[0] > limit.tokens for limit in (qwen, byt5)}
    assert cut["Qwen2.5-VL"] == (strategy.qwen([TEMPLATE.format(caption)]).input_ids[0] != tokens["text"][0].tolist())
    assert cut["byT5 (text in quotes)"] == (name in ("long", "long in quotes"))
    assert (name == "long") or not cut["Qwen2.5-VL"]
    assert len(CAPTIONS["long"]) > 2000


def test_the_template_is_what_is_dropped(strategy: HunyuanTokenize) -> None:
    before, after = TEMPLATE.split("{}")
    assert len(strategy.qwen(before).input_ids) == DROPPED
    qwen, byt5 = strategy.limits()
    assert (qwen.tokens, byt5.tokens) == (LENGTH - len(strategy.qwen(after).input_ids), GLYPHS_LENGTH - 1)


@torch.no_grad()
def test_a_caption_without_quotes_has_no_glyphs_in_any_company(models: Models) -> None:
    captions = ["a cat", 'a "cat"']
    together, alone = (models.encode(models.tokenize(texts)) for texts in (captions, captions[:1]))
    assert alone["glyphs"].shape == (1, 0, llms.BYT5_WIDTH) and "glyphs_mask" not in alone
    assert together["glyphs_mask"].sum(1).tolist()[0] == 0 and not together["glyphs"][0].any()
    kept = [OUTPUTS.entry(together, i) for i in (0, 1)]
    assert [len(entry["glyphs"]) for entry in kept] == [0, int(together["glyphs_mask"][1].sum())]
    assert OUTPUTS.join(kept[:1]).keys() == alone.keys()


def test_what_is_kept_depends_on_vocabularies_and_states(models: Models) -> None:
    """The vocabularies are those beside the file."""
    settings = models.tokenize_strategy.settings
    assert settings["qwen25vl"] == fingerprint(llms.qwen_tokenizer())
    assert settings["byt5"] == fingerprint(llms.byt5_tokenizer())
    assert (settings["template"], settings["length"]) == (TEMPLATE, LENGTH)
    assert HunyuanEncode().settings == {"hidden": -3}


def test_what_is_visible_is_told_without_reading_from_a_device() -> None:
    states, mask = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, dtype=torch.bool, device="meta")
    assert strategies._visible("text", states, mask).keys() == {"text", "text_mask"}  # a meta tensor has no truth
