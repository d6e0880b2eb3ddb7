"""Captions of Lumina Image 2.0: Gemma's states as the pipeline has them, the system prompt, limits and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tinies import lumina2
from tinies.cases import Files
from tinies.llms import gemma_tokenizer
from torch import Tensor

from sfumato.families.lumina2.facts import Options
from sfumato.families.lumina2.family import FAMILY
from sfumato.models import loading
from sfumato.models.base import Models
from sfumato.sampling.sample import encode_prompts

CAPTIONS = [
    "a cat on a mat, 'red' \"photo\" \N{LEFT DOUBLE QUOTATION MARK}girl\N{RIGHT DOUBLE QUOTATION MARK} \N{LEFT SINGLE QUOTATION MARK}dog\N{RIGHT SINGLE QUOTATION MARK}",
    "\N{CAT FACE} \u4e00\u53ea\u732b",
    "red " * 500,
    "",
]
"""Quotes in four styles, an emoji and Chinese, 2,000 characters, nothing."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    files: Files = lumina2.write(tmp_path_factory.mktemp("model"))
    options = Options(**files.options)
    return loading.load(FAMILY, str(files.model), options, vae=files.vae, tokenizer=str(files.model.parent))


def told(models: Models, **options: Any) -> Models:
    return replace(models, options=replace(models.options, **options))


def said(models: Models, captions: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(models.encode(models.tokenize(captions)))


def test_captions_of_all_kinds_are_those_of_the_pipeline(models: Models) -> None:
    """Longer ones are cut as there."""
    pipe = lumina2.pipeline()
    with torch.no_grad():
        _, _, states, mask = pipe.encode_prompt(CAPTIONS, negative_prompt=CAPTIONS, device="cpu")
    found = said(models, CAPTIONS)
    counts = mask.sum(1).tolist()
    assert counts[2:] == [256, 1] and found["gemma2_mask"].sum(1).tolist() == counts
    for mine, theirs, count in zip(found["gemma2"], states, counts, strict=True):
        torch.testing.assert_close(mine[:count], theirs[:count], atol=1e-5, rtol=1e-5)
        assert not mine[count:].any()


def test_the_system_prompt_of_diffusers_makes_its_encodings(models: Models) -> None:
    """Of prompts; the negative ones have none, nor has an empty caption, which stands for one that was dropped."""
    pipe = lumina2.pipeline()
    own, captions = told(models, system_prompt=pipe.system_prompt), ["a cat on a mat", "red"]
    with torch.no_grad():
        positive, mask, negative, negative_mask = pipe.encode_prompt(captions, negative_prompt=captions, device="cpu")
        away = own.encode(own.tokenize(captions, negative=True))
    for found, states, used in ((said(own, captions), positive, mask), (away, negative, negative_mask)):
        n = int(used.sum(1).max())
        torch.testing.assert_close(found["gemma2"], states[:, :n] * used[:, :n, None], atol=1e-5, rtol=1e-5)
    assert torch.equal(said(own, [""])["gemma2"], said(models, [""])["gemma2"])


def test_one_text_as_prompt_and_negative_prompt_is_encoded_twice(models: Models) -> None:
    prompt = replace(lumina2.CASES[0].prompt, negative_prompt=lumina2.CASES[0].prompt.prompt)
    found = encode_prompts(told(models, system_prompt="a photo"), [prompt])
    lengths = {negative: len(each["gemma2"]) for (_, negative), each in found.items()}
    assert lengths[False] > lengths[True]


def test_what_is_cut_is_told(models: Models) -> None:
    """Less is left of Gemma's tokens beside a system prompt."""
    (limit,) = models.tokenize_strategy.limits()
    assert (limit.tokens, limit.encoder, limit.raised_by) == (255, "Gemma", "gemma2_max_token_length")
    assert [count > limit.tokens for count in limit.count(CAPTIONS)] == [False, False, True, False]
    before = len(gemma_tokenizer()("a photo of <Prompt Start> ", add_special_tokens=False).input_ids)
    (limit,) = told(models, system_prompt="a photo of").tokenize_strategy.limits()
    assert limit.tokens == 255 - before
    # After the space "cat" is one token; at the start of a text it is three.
    captions = [f"cat {'z' * n}" for n in range(225, 245)]
    tokens = gemma_tokenizer()([f"a photo of <Prompt Start> {caption}" for caption in captions]).input_ids
    cut = [len(ids) > 256 for ids in tokens]
    assert any(cut) and not all(cut) and [count > limit.tokens for count in limit.count(captions)] == cut
    (limit,) = told(models, system_prompt="red " * 500).tokenize_strategy.limits()
    assert limit.tokens == 0


def test_states_are_kept_without_padding(models: Models) -> None:
    strategy, cond = models.outputs, said(models, CAPTIONS)
    entries = [strategy.entry(cond, i) for i in range(len(CAPTIONS))]
    assert [len(entry["gemma2"]) for entry in entries] == cond["gemma2_mask"].sum(1).tolist()
    assert strategy.dtype == torch.bfloat16
    joined = strategy.join(entries)
    assert joined.keys() == cond.keys() and all(torch.equal(joined[name], cond[name]) for name in cond)
    assert strategy.join(entries[:1]).keys() == {"gemma2"}, "without padding there is no mask"
    assert said(models, ["a cat"] * 2).keys() == {"gemma2"}


def test_settings_say_what_the_result_depends_on(models: Models) -> None:
    changes: list[dict[str, Any]] = [{}, {"gemma2_max_token_length": 77}, {"system_prompt": "a photo"}]
    assert len({str(told(models, **change).tokenize_strategy.settings) for change in changes}) == len(changes)


def test_the_tokenizer_may_lie_beside_the_file(tmp_path: Path) -> None:
    files = lumina2.write(tmp_path, bundled=True)
    made = loading.load(FAMILY, str(files.model), Options())
    assert made.tokenizers["gemma2"].get_vocab() == gemma_tokenizer().get_vocab()
