"""Captions to tokens to states, against diffusers and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from sfumato.families.sd.facts import Options
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.strategies import SdTokenize, chunks, emphasis, join
from sfumato.models import loading
from sfumato.models.base import Models

CAPTIONS = ["a cat on a mat", "", "red " * 80 + "end", "one, two! " * 60]


@pytest.fixture(scope="module", params=[False, True], ids=["1.x", "2.x"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return (tiny.tiny_sd2 if request.param else tiny.tiny_sd1)(tmp_path_factory.mktemp("model"))


def states(models: Models, captions: list[str]) -> Tensor:
    with torch.no_grad():
        return models.encode(models.tokenize(captions))["hidden"]


@pytest.mark.parametrize("skip", [None, 1])
def test_states_of_75_tokens_equal_the_pipelines(path: Path, skip: int | None) -> None:
    models = loading.load(FAMILY, str(path), Options(clip_skip=skip))
    with torch.no_grad():
        expected, _ = tiny.pipeline(v2=bool(models.options.v2)).encode_prompt(CAPTIONS, "cpu", 1, False)
    torch.testing.assert_close(states(models, CAPTIONS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "skip"), [(75, 2), (150, 1), (225, 1), (225, 2)])
def test_states_of_chunks_are_those_of_each_chunk(path: Path, length: int, skip: int) -> None:
    """Each run of 75 tokens is a caption of its own to the text model; only the inner states and the two ends are kept."""
    models = loading.load(FAMILY, str(path), Options(max_token_length=length, clip_skip=skip))  # type: ignore[arg-type]
    v2 = bool(models.options.v2)
    text, tokenizer = tiny.parts(v2=v2).text, tiny.tokenizer(v2=v2)
    norm = dict(text.named_modules()).get("final_layer_norm") or text.text_model.final_layer_norm
    got = states(models, CAPTIONS)
    assert got.shape == (len(CAPTIONS), length + 2, tiny.WIDTH)
    for caption, ours in zip(CAPTIONS, got, strict=True):
        ids = tokenizer(caption, add_special_tokens=False, truncation=True, max_length=length).input_ids
        parts = []
        for start in range(0, length, 75):
            words = ids[start : start + 75]
            row = torch.tensor(
                [
                    [
                        tokenizer.bos_token_id,
                        *words,
                        tokenizer.eos_token_id,
                        *[tokenizer.pad_token_id] * (75 - len(words)),
                    ]
                ]
            )
            with torch.no_grad():
                parts.append(norm(text(row, output_hidden_states=True).hidden_states[-skip])[0])
        expected = torch.cat([parts[0][:1], *(part[1:76] for part in parts), parts[-1][76:]])
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_caption_that_fits_is_tokenized_as_transformers_does() -> None:
    for v2 in (False, True):
        tokenizer = tiny.tokenizer(v2=v2)
        expected = tokenizer(
            CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        assert torch.equal(SdTokenize(tokenizer).tokenize(CAPTIONS)["ids"][:, 0], expected)
        for few in (CAPTIONS, CAPTIONS[:1]):
            expected = tokenizer(few, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
            assert torch.equal(SdTokenize(tokenizer, padded=False).tokenize(few)["ids"][:, 0], expected)


def test_rows_of_chunks() -> None:
    rows = chunks(list(range(100, 180)), 225, 1, 2, 0)
    assert [len(row) for row in rows] == [77] * 3
    assert rows[0] == [1, *range(100, 175), 2]
    assert rows[1] == [1, *range(175, 180), 2, *[0] * 70]
    assert rows[2] == [1, 2, *[0] * 75]
    assert chunks(list(range(100)), 75, 1, 2, 0) == [[1, *range(75), 2]]


def test_join_keeps_the_inner_states() -> None:
    x = torch.arange(154.0).view(1, 2, 77, 1)
    assert join(x).flatten().tolist() == [0, *range(1, 76), *range(78, 153), 153]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("plain text", [("plain text", 1.0)]),
        ("", [("", 1.0)]),
        ("a (cat) here", [("a ", 1.0), ("cat", 1.1), (" here", 1.0)]),
        ("a (cat:1.3), b", [("a ", 1.0), ("cat", 1.3), (", b", 1.0)]),
        ("((x))", [("x", 1.1 * 1.1)]),
        ("[x]", [("x", 1 / 1.1)]),
        ("(a (b:0.5))", [("a ", 1.1), ("b", 0.5 * 1.1)]),
        (r"\(kept\) \[too\]", [("(kept) [too]", 1.0)]),
        ("ratio 1:2 (x: 1.5 )", [("ratio 1:2 ", 1.0), ("x", 1.5)]),
        ("(open", [("open", 1.1)]),
        ("a) b] c", [("a) b] c", 1.0)]),
        ("(a: b)", [("a: b", 1.1)]),
        (r"back\slash", [(r"back\slash", 1.0)]),
    ],
)
def test_emphasis(caption: str, expected: list[tuple[str, float]]) -> None:
    got = emphasis(caption)
    assert [text for text, _ in got] == [text for text, _ in expected]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected])


def test_weights_multiply_the_states_of_their_tokens(path: Path) -> None:
    plain = loading.load(FAMILY, str(path), Options(max_token_length=150))
    weighted = loading.load(FAMILY, str(path), Options(max_token_length=150, weighted_captions=True))
    caption = "a (cat:1.5) on [a] mat"
    tokens = weighted.tokenize([caption])
    expected = states(plain, ["a cat on a mat"])
    factor = tokens["weights"][:, :, 1:-1].flatten(1)[..., None]
    assert sorted(set(factor.flatten().tolist())) == pytest.approx([1 / 1.1, 1.0, 1.5])
    expected[:, 1:-1] *= factor
    torch.testing.assert_close(states(weighted, [caption]), expected)
    assert torch.equal(tokens["ids"], plain.tokenize(["a cat on a mat"])["ids"])


def test_settings_say_what_the_result_depends_on(path: Path) -> None:
    a, b = (loading.load(FAMILY, str(path), Options(max_token_length=n, clip_skip=s)) for n, s in ((75, 1), (150, 2)))  # type: ignore[arg-type]
    assert a.tokenize_strategy.settings != b.tokenize_strategy.settings
    assert a.encode_strategy.settings != b.encode_strategy.settings
    assert a.outputs.fields == ("hidden",)
