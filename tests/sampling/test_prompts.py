"""Prompt files in sd-scripts' syntax, and what is wrong in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato import families
from sfumato.config import Config, DatasetConfig, SampleConfig
from sfumato.errors import UserError
from sfumato.families.sd.facts import Options
from sfumato.formats import files
from sfumato.sampling.prompts import OWN, Prompt, default, of_run, own, parse_line, read_prompts, sized


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_line_with_all_options() -> None:
    line = "a cat, (red:1.2) --n bad hands, blurry --w 640 --H 768 --d 7 --s 20 --l 6.5 --g 3.5 --ss k_euler_a"
    assert parse_line(line) == Prompt(
        prompt="a cat, (red:1.2)",
        negative_prompt="bad hands, blurry",
        width=640,
        height=768,
        seed=7,
        sample_steps=20,
        scale=6.5,
        guidance_scale=3.5,
        sample_sampler="euler_a",
    )


def test_the_prompt_itself_is_never_an_option() -> None:
    assert parse_line("w 100 foo") == Prompt(prompt="w 100 foo")
    assert parse_line("n foo --w 64").prompt == "n foo"
    assert (
        parse_line("a cat -- happy, well-done--really, 2--3 --w 64").prompt == "a cat -- happy, well-done--really, 2--3"
    )


def test_a_line_may_draw_without_a_prompt() -> None:
    assert parse_line("--w 64 --d 1") == Prompt(prompt="", width=64, seed=1)


@given(
    st.text(st.characters(blacklist_categories=("Cs", "Cc", "Z")), min_size=1),
    st.integers(8, 2048),
    st.integers(0, 2**63),
)
def test_text_without_options_is_kept_whole(text: str, width: int, seed: int) -> None:
    if text.startswith("--"):
        text = "x" + text
    assert parse_line(f"{text} --w {width} --d {seed}") == Prompt(prompt=text, width=width, seed=seed)


def test_a_text_file_skips_comments_and_blank_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", "\ufeffa cat --w 64\n\n# a comment --q\n   \n  a dog\r\n")
    assert read_prompts(path, Prompt(height=96)) == [
        Prompt(prompt="a cat", width=64, height=96),
        Prompt(prompt="a dog", height=96),
    ]


def test_all_mistakes_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", "ok --w 64\na --q 1\nb --w wide --s 0\n\nc --d 1 --d 2 --n\nd --ss eulr --w 64px")
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    messages = list(caught.value.messages)
    assert [m.removeprefix(f"{path}:")[:1] for m in messages] == ["2", "3", "3", "5", "5", "6", "6"]
    for message, words in zip(
        messages, ("--q", "wide", "1 to 1000", "twice", "--n needs", "'euler'", "64px"), strict=True
    ):
        assert words in message


def test_a_family_takes_the_options_that_it_has_defaults_for() -> None:
    sd3, has_all = default(families.facts("sd3").options()), Prompt(**dict.fromkeys(OWN, 1))
    assert own(Prompt(), sd3) == {"flow_shift": 3.0}
    assert parse_line("a --fs 5.5", default=sd3).flow_shift == 5.5
    line = parse_line("a --ctr 0.5 --rcfg 0 --fs 6", default=has_all)
    assert (line.cfg_trunc_ratio, line.renorm_cfg, line.flow_shift) == (0.5, 0.0, 6.0)
    assert own(line, has_all) == dict.fromkeys(OWN, 1) | {"cfg_trunc_ratio": 0.5, "renorm_cfg": 0.0, "flow_shift": 6.0}
    with pytest.raises(UserError) as caught:
        parse_line("a --ctr 0.5 --rcfg 1 --fs 3", default=sd3)
    assert [m.split(":")[1].strip() for m in caught.value.messages] == ["cfg_trunc_ratio", "renorm_cfg"]
    with pytest.raises(UserError, match="cfg_trunc_ratio: 0 to 1 was expected"):
        parse_line("a --ctr 25", default=has_all)


def test_toml_subsets_go_over_the_defaults(tmp_path: Path) -> None:
    text = """
    [prompt]
    width = 64
    scale = 5
    negative_prompt = "dull"
    [[prompt.subset]]
    prompt = "a cat"
    [[prompt.subset]]
    prompt = "a dog"
    width = 128
    seed = 3
    sample_sampler = "ddim"
    """
    assert read_prompts(written(tmp_path, "p.toml", text)) == [
        Prompt(prompt="a cat", width=64, scale=5.0, negative_prompt="dull"),
        Prompt(prompt="a dog", width=128, scale=5.0, negative_prompt="dull", seed=3, sample_sampler="ddim"),
    ]


def test_toml_without_subsets_is_one_prompt(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.toml", '[prompt]\nprompt = "a cat"')) == [Prompt(prompt="a cat")]


def test_json_takes_tables_and_lines(tmp_path: Path) -> None:
    entries = [{"prompt": "a cat", "sample_steps": 5}, "a dog --w 64"]
    assert read_prompts(written(tmp_path, "p.json", json.dumps(entries))) == [
        Prompt(prompt="a cat", sample_steps=5),
        Prompt(prompt="a dog", width=64),
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.toml", '[prompt]\nprompt = "a"\nwidht = 64', "'widht'; did you mean 'width'?"),
        (
            "p.toml",
            "[prompt]\nprompt = 'a'\n[[prompt.subset]]\n[[prompt.subset]]\nwidth = '64x'",
            "[[prompt.subset]] 2: width: a whole number",
        ),
        ("p.toml", "[prompt]\nprompt = 'a'\nwidth = 64.5", "a whole number was expected, not 64.5"),
        ("p.toml", "[prompt]\nprompt = 'a'\nseed = true", "not True"),
        ("p.toml", "[prompt]\nprompt = 1", "text was expected"),
        ("p.toml", "[prompt]\nprompt = 'a'\nscale = nan", "scale"),
        ("p.toml", "[prompt\n", "is not TOML"),
        ("p.toml", "[prompts]\n", "[prompt] with [[prompt.subset]]"),
        ("p.toml", "[prompt]\nsubset = 1", "two brackets"),
        ("p.json", '[{"width": 64}]', "`prompt` is missing"),
        ("p.json", '[{"prompt": "a", "controlnet_image": 1}]', "text was expected"),
        ("p.json", '[{"prompt": "a", "flow_shift": 3}]', "entry 1: flow_shift: the samples of this model have no use"),
        ("p.json", '{"prompt": "a"}', "a list"),
        ("p.json", "[1]", "a list"),
        ("p.json", "[", "is not JSON"),
        ("p.txt", "# nothing", "holds no prompt"),
        ("p.yaml", "a", ".txt, .toml or .json"),
    ],
)
def test_mistakes_are_reported(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt: is not a text file in UTF-8"):
        read_prompts(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    "line", ["a cat –w 64", "a cat —W 64", "a cat −ss euler", "–d 1", "a cat –-w 64", "a cat –w 64 –h 64"]
)
def test_an_option_with_a_long_dash_is_warned_of(line: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parse_line(line, "p.txt:3").prompt == line
    assert len(caplog.messages) == line.count(" –") + line.count(" —") + line.count(" −") + line.startswith("–")
    assert all(
        m.startswith("p.txt:3: ") and "is read as text: an option begins with two hyphens, --" in m
        for m in caplog.messages
    )


@pytest.mark.parametrize(
    "line", ["a cat – a dog", "a well–known cat", "a – b", "a cat –which sits on w 64", "1990–s 3"]
)
def test_a_long_dash_in_text_is_text(line: str, caplog: pytest.LogCaptureFixture) -> None:
    parse_line(line)
    assert not caplog.messages


def test_a_prompt_without_a_size_has_the_size_of_the_run(tmp_path: Path) -> None:
    sample = SampleConfig(sample_prompts=str(written(tmp_path, "p.txt", "a cat\na dog --w 640\n")))
    config = Config(sample=sample, family=Options())
    assert [(p.width, p.height) for p in of_run(config, [DatasetConfig(resolution=(96, 64))])] == [(96, 64), (640, 64)]
    assert of_run(Config(family=Options()), []) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("64x96", (64, 96)), ("0x0", None), ("64", None), ("99999x64", None), ("64x4", None), ("x64", None), (None, None)],
)
def test_a_prompt_without_a_size_has_the_size_that_the_file_was_trained_at(
    text: str | None, size: tuple[int, int] | None, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    files.save(first, {"x": torch.zeros(1)}, {"modelspec.resolution": text} if text else {})
    files.save(second, {"x": torch.zeros(1)}, {"modelspec.resolution": "32x48"})
    for paths, wanted in (((first,), size or (512, 512)), ((tmp_path, "owner/name", first, second), size or (32, 48))):
        found = sized(Prompt(), *paths)
        assert (found.width, found.height) == wanted
