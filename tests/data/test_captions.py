"""The order in which a caption is varied."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sfumato.config.data import CaptionOptions
from sfumato.data.captions import endless, every, tags, vary, with_whole_warmup


def say(line: str | tuple[str, ...], seed: int = 0, epoch: int = 1, step: int = 0, **options: Any) -> str:
    lines = (line,) if isinstance(line, str) else line
    return vary(lines, CaptionOptions(**options), random.Random(seed), epoch=epoch, step=step)


def many(line: str | tuple[str, ...], **options: Any) -> set[str]:
    return {say(line, seed, **options) for seed in range(60)}


def test_a_caption_is_left_alone_by_default() -> None:
    assert say("a,b,  c") == "a,b,  c"


def test_the_first_line_counts_without_wildcards() -> None:
    assert say(("one", "two")) == "one"


def test_prefix_and_suffix_have_a_space_and_go_before_the_tags_are_parted() -> None:
    assert say("a, b", caption_prefix="pre", caption_suffix="suf") == "pre a, b suf"
    assert many("a, b, c", caption_prefix="pre,", shuffle_caption=True, keep_tokens=1) >= {
        "pre, b, a, c",
        "pre, c, b, a",
    }


def test_dropout_takes_prefix_and_suffix_too() -> None:
    assert many("a", caption_dropout_rate=0.5, caption_prefix="pre") == {"", "pre a"}
    assert say("a", caption_dropout_rate=1.0) == ""


def test_dropout_rate_is_a_chance() -> None:
    dropped = sum(say("a", seed, caption_dropout_rate=0.25) == "" for seed in range(2000))
    assert 430 < dropped < 570  # 500, within 3.6 standard deviations


def test_every_nth_epoch_is_empty() -> None:
    assert [say("a", epoch=e, caption_dropout_every_n_epochs=2) for e in (1, 2, 3, 4)] == ["a", "", "a", ""]


def test_wildcards_choose_and_escape() -> None:
    assert many("a {red|blue} {{x}}", enable_wildcard=True) == {"a red {x}", "a blue {x}"}
    assert many(("one", "two {a|b}"), enable_wildcard=True) == {"one", "two a", "two b"}
    assert say("a {red|blue}") == "a {red|blue}"


def test_kept_tags_stay_in_front() -> None:
    for caption in many("k1, k2, a, b, c", shuffle_caption=True, keep_tokens=2):
        assert caption.startswith("k1, k2, ")
        assert sorted(caption.split(", ")[2:]) == ["a", "b", "c"]
    assert len(many("k1, k2, a, b, c", shuffle_caption=True, keep_tokens=2)) == 6


def test_kept_parts_by_a_mark() -> None:
    marked = "k1, k2 ||| a, b, c ||| end"
    for caption in many(marked, shuffle_caption=True, keep_tokens_separator="|||"):
        assert caption.startswith("k1, k2, ")
        assert caption.endswith(", end")
    assert say(marked, keep_tokens_separator="|||") == "k1, k2, a, b, c, end"


def test_tag_dropout_spares_kept_tags() -> None:
    assert say("k, a, b", caption_tag_dropout_rate=1.0, keep_tokens=1) == "k"
    assert {len(c.split(", ")) for c in many("k, a, b, c", caption_tag_dropout_rate=0.5, keep_tokens=1)} == {1, 2, 3, 4}


def test_the_separator_is_kept_when_tags_are_shuffled_or_dropped() -> None:
    assert many("red hair, long; blue sky", caption_separator=";", shuffle_caption=True) == {
        "red hair, long; blue sky",
        "blue sky; red hair, long",
    }
    assert many("red hair, long; sky", caption_separator=";", caption_tag_dropout_rate=0.5) == {
        "red hair, long; sky",
        "red hair, long",
        "sky",
        "",
    }
    assert many("a b", caption_separator=" ", shuffle_caption=True) == {"a b", "b a"}
    assert many("a,b", caption_separator=", ", shuffle_caption=True) == {"a,b"}
    assert many("k|||a;b", caption_separator=";", keep_tokens_separator="|||") == {"k; a; b"}


def test_the_marks_of_tags_act_without_shuffling() -> None:
    assert say("k1, k2 ||| a, b", keep_tokens_separator="|||") == "k1, k2, a, b"
    assert say("a;;;b, c", secondary_separator=";;;") == "a,b, c"


def test_counted_tags_follow_the_separators() -> None:
    marks = CaptionOptions(caption_separator=";", keep_tokens_separator="|||", secondary_separator="+")
    assert tags(("A Cat, sitting ||| Red+blue; ; green ||| end", "second"), marks) == [
        "a cat, sitting",
        "red",
        "blue",
        "green",
        "end",
    ]
    assert tags(("one, Two", "three"), CaptionOptions(enable_wildcard=True)) == ["one", "two", "three"]


def test_the_secondary_separator_keeps_tags_together_while_shuffling() -> None:
    together = many("a;;;b, c", shuffle_caption=True, secondary_separator=";;;")
    assert together == {"a,b, c", "c, a,b"}


def test_warmup_shows_more_and_more_tags_and_takes_them_before_the_shuffle() -> None:
    shown = [
        say("k, a, b, c, d", step=s, keep_tokens=1, token_warmup_min=1, token_warmup_step=6) for s in (0, 2, 4, 6, 100)
    ]
    assert shown == ["k, a", "k, a, b", "k, a, b, c", "k, a, b, c, d", "k, a, b, c, d"]
    assert many("a, b, c", step=0, token_warmup_step=10, shuffle_caption=True) == {"a"}


def test_a_share_of_the_run_becomes_steps() -> None:
    assert with_whole_warmup(CaptionOptions(token_warmup_step=0.25), 90) == 22
    assert with_whole_warmup(CaptionOptions(token_warmup_step=7), 90) == 7


def test_endless_options_are_named() -> None:
    assert endless(CaptionOptions(shuffle_caption=True, token_warmup_step=3)) == [
        "shuffle_caption",
        "token_warmup_step",
    ]
    assert endless(CaptionOptions(caption_dropout_rate=0.5, enable_wildcard=True)) == []


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        (("a, b",), {}),
        (("a, b",), {"caption_dropout_rate": 0.5, "caption_suffix": "x"}),
        (("one {a|b} {c|d}", "two {{3}}"), {"enable_wildcard": True, "caption_dropout_rate": 0.2}),
        (("k ||| a;;;b",), {"keep_tokens_separator": "|||", "secondary_separator": ";;;"}),
    ],
)
def test_every_is_all_that_vary_gives(lines: tuple[str, ...], options: dict[str, Any]) -> None:
    varied = {vary(lines, CaptionOptions(**options), random.Random(seed), epoch=1, step=0) for seed in range(300)}
    assert set(every(lines, CaptionOptions(**options)) or ()) == varied


def test_too_many_wildcards_are_not_counted_out() -> None:
    assert every(("{a|b}" * 60,), CaptionOptions(enable_wildcard=True)) is None
