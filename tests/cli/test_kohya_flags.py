"""Every flag of every trainer of sd-scripts, given to ours one by one: it acts, or is accepted or refused with a reason.
`make docs` writes docs/kohya-flags.md by it."""

from __future__ import annotations

import os
import re
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin
from unittest.mock import patch

import pytest
from cli_files import SHAPES, pairs, safetensors
from PIL import Image

from sfumato.cli import flags, kohya, kohya_settings, options, values
from sfumato.cli.report import Report
from sfumato.config import relations, rules
from sfumato.errors import UserError

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "kohya-flags.md"
BASE = {"pretrained_model_name_or_path": "base.safetensors", "dataset_config": "data.toml"}
FOLLOWING = {"dataset_config": "pairs.toml"}
OF_METHOD = {"embedding": {"token_string": "mychar"}, "controlnet": FOLLOWING, "lllite": FOLLOWING}
"""What a script's line must have besides."""
NO_EFFECT = "accepted, no effect: "
PATHS = {"file": "file.txt", "folder": "folder", "new folder": "new", "weights": "base.safetensors", "state": "folder"}
GIVEN = {
    "block_lr": ",".join(["1e-4"] * 23), "bucket_reso_steps": "128", "config_file": "file.toml", "dataset_config": "data.toml",
    "face_crop_aug_range": "2,4", "lr_scheduler_args": "T_max=10", "network_args": "conv_dim=4", "optimizer_type": "Lion",
    "pretrained_model_name_or_path": "base.safetensors", "reg_data_dir": "classes", "resolution": "512", "train_data_dir": "images",
    "huggingface_repo_id": "some/thing", "in_json": "meta.json", "dataset_class": "some.Thing", "lllite_cond_dim": "32",
    "lllite_target_layers": "self_attn_qkv", "apply_t5_attn_mask": "true", "token_warmup_step": "10",
}  # fmt: skip
"""Flag -> a value, where its type does not give one."""
BESIDE = {
    "blocks_to_swap": {"fused_backward_pass": "true"},
    "double_blocks_to_swap": {"fused_backward_pass": "true"},
    "dynamo_backend": {"torch_compile": "true", "dynamo_backend": "eager"},
    "full_bf16": {"mixed_precision": "bf16"},
    "lr_warmup_steps": {"lr_scheduler": "linear"},
    "masked_loss": {"alpha_mask": "true"},
    "prior_loss_weight": {"reg_data_dir": "classes"},
    "resolution": {"train_data_dir": "images"},
    "single_blocks_to_swap": {"fused_backward_pass": "true"},
}
"""Flag -> what it acts beside, where no rule that stands with it says so."""


def known(family: str) -> Mapping[str, options.Option]:
    return {**options.known(), **options.common(), **options.of_family(family)}


def sample(option: options.Option) -> str:
    """A value that is not the default."""
    inner = values.parts(option.kind)
    if path := rules.path_to(option.hint):
        return PATHS[path]
    chosen = [c for kind in inner if get_origin(kind) is Literal for c in get_args(kind) if c != option.default]
    if chosen:
        return str(chosen[0])
    if bool in inner:
        return "false" if option.default is True else "true"
    if any("float" in str(kind) for kind in inner):
        return "0.25"
    return "3" if int in inner else "3,3" if values.PAIR in inner else "some/thing" if "repo" in option.name else "x=1"


def line(family: str, flag: str, seen: tuple[str, ...] = ()) -> dict[str, str]:
    """The flag with a value, and with all that it needs beside it."""
    name, fixed = kohya_settings.RENAMED.get(flag, (flag, None))
    if (option := known(family).get(name)) is None or fixed is not None:
        return {flag: "true"}
    found = {flag: GIVEN.get(flag) or sample(option), **BESIDE.get(flag, {})}
    for rule in rules.marks(option.hint):
        if type(rule) is rules.Needs and rule.names[0] not in seen:
            other = rule.names[0]
            found |= {other: min(map(str, rule.among))} if rule.among else line(family, other, (*seen, flag))
    return found


def answers(script: str, family: str) -> dict[str, str]:
    """Flag -> what is said of it: nothing where it acts. All are given at once, and by themselves those of which
    something was said then."""
    report, words, more = Report(), dict[str, str](), OF_METHOD.get(kohya.scripts()[script].method, {})
    for flag in set(pairs()[script]) - {*flags.CONFIGS, *kohya_settings.INERT}:
        words |= line(family, flag)
    with patch.object(flags, "Report", lambda: report), pytest.raises(UserError):
        kohya.resolve(script, [f"--{name}={value}" for name, value in {**BASE, **more, **words}.items()])
    spoken = {text.partition(":")[0].removeprefix("--") for text in (*report.errors, *report.notices)}
    kept = spoken | kohya_settings.INERT.keys()
    return {flag: said(script, family, flag) if flag in kept else "" for flag in pairs()[script]}


def said(script: str, family: str, flag: str) -> str:
    """What a script says of a flag: nothing where it acts."""
    if flag in kohya_settings.INERT:
        return f"{NO_EFFECT}{kohya_settings.INERT[flag]}"
    if flag in flags.CONFIGS or f"--{flag}" in kohya.TAKEN:
        return ""
    words = {**BASE, **OF_METHOD.get(kohya.scripts()[script].method, {}), **line(family, flag)}
    if {"train_data_dir", "reg_data_dir", "in_json"} & words.keys():
        words |= {"train_data_dir": "images"}
        if words.pop("dataset_config") == "pairs.toml":
            words |= {"train_data_dir": "images/1_a", "conditioning_data_dir": "hints"}
    if flag == "dataset_class" and words.pop("dataset_config") == "pairs.toml":
        words["conditioning_data_dir"] = "hints"
    try:
        found = kohya.resolve(script, [f"--{name}={value}" for name, value in words.items()])
    except UserError as error:
        own = [m for m in error.messages if m.startswith(f"--{flag}:")]
        return (own or list(error.messages))[0].removeprefix(f"--{flag}: ")
    own = [n.removeprefix(f"--{flag}: ") for n in found.notices if n.startswith(f"--{flag}: {NO_EFFECT}")]
    return own[0] if own else ""


@contextmanager
def place(folder: Path) -> Iterator[None]:
    """A folder with what the samples name, and base models of whichever family is wanted."""
    safetensors(folder / "base.safetensors", SHAPES)
    (folder / "folder").mkdir()
    for name in ("images/1_a", "classes/1_b"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / name / "a.png")
    (folder / "hints").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "hints" / "a.png")
    (folder / "meta.json").write_text('{"1_a/a": {"caption": "a"}}')
    (folder / "file.txt").write_text("a")
    data = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "images/1_a"\n'
    (folder / "data.toml").write_text(data)
    (folder / "pairs.toml").write_text(data + 'conditioning_data_dir = "hints"\n')
    here = Path.cwd()
    os.chdir(folder)
    try:
        with (  # what is the same in each line is made once
            patch.object(flags, "parser", cache(flags.parser)),
            patch.object(rules.Record, "__post_init__", lambda _: None),
            patch.object(relations, "find_spec", lambda library: library),
        ):
            yield
    finally:
        os.chdir(here)


def family_of(script: str) -> str:
    """The family that a script is named by, or its first."""
    theirs = kohya.scripts()[script].families
    return next((each for each in theirs if script.startswith(each)), theirs[0])


def table() -> dict[str, dict[str, str]]:
    """Script -> flag -> what is said of it."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, place(Path(folder)):
        for script in pairs():
            family = family_of(script)
            with patch("sfumato.families.detect.detect_file", lambda _, family=family: SimpleNamespace(family=family)):
                found[script] = answers(script, family)
    return found


def text(found: Mapping[str, Mapping[str, str]]) -> str:
    """The table as a page."""
    said_of = [(script, flag, said) for script, answers in found.items() for flag, said in answers.items()]
    refused = [each for each in said_of if each[2] and not each[2].startswith(NO_EFFECT)]
    stated = [each for each in said_of if each[2].startswith(NO_EFFECT)]
    acting = len(said_of) - len(refused) - len(stated)
    always = sorted({flag for _, flag, said in said_of if not said} - {flag for _, flag, said in said_of if said})
    return "\n".join(
        [
            "# The flags of sd-scripts' trainers",
            "",
            f"Each flag of each of its {len(found)} trainers, given to the script of the same name here: of {len(said_of)} pairs",
            f"{acting} act (beside what they need), {len(stated)} are accepted without effect, which is said with the reason, and",
            f"{len(refused)} are refused with what to do instead. None is unknown. Scripts of several families were asked for the",
            "one that they are named by. `tests/cli/test_kohya_flags.py` asks, compares and writes this page.",
            "",
            "## Refused",
            "",
            *rows(refused, found),
            "",
            "## Accepted without effect",
            "",
            *rows([(script, flag, said.removeprefix(NO_EFFECT)) for script, flag, said in stated], found),
            "",
            "## Acting in every script that has them",
            "",
            *textwrap.wrap(", ".join(f"`{flag}`" for flag in always), 118, break_on_hyphens=False),
            "",
        ]
    )


def rows(each: Iterable[tuple[str, str, str]], found: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """A line for each flag and answer, with the scripts that gave it."""
    gathered: dict[tuple[str, str], list[str]] = {}
    for script, flag, said in each:
        said = re.sub(r"(but the base model is of )the family \w+", r"\1another", said)
        gathered.setdefault((flag, said), []).append(script)
    yield from ("| flag | why | scripts |", "|---|---|---|")
    for (flag, said), scripts in sorted(gathered.items()):
        having = [script for script, answers in found.items() if flag in answers]
        others = [script for script in having if script not in scripts]
        names = "all" if not others else ", ".join(scripts)
        names = names if len(scripts) <= len(others) or not others else f"all but {', '.join(others)}"
        yield f"| `{flag}` | {said} | {names} |"


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, str]]:
    return table()


def test_every_trainer_is_there_and_no_flag_is_unknown(found: dict[str, dict[str, str]]) -> None:
    assert found.keys() == pairs().keys()
    assert sum(map(len, found.values())) > 4000
    assert not [flag for answers in found.values() for flag, said in answers.items() if "unknown" in said]


def test_what_is_refused_is_not_refused_for_being_unfinished(found: dict[str, dict[str, str]]) -> None:
    refused = {said for answers in found.values() for said in answers.values() if not said.startswith(NO_EFFECT)}
    assert not [said for said in refused if "yet" in said.split()]


def test_the_table_in_the_docs_is_this_one(found: dict[str, dict[str, str]]) -> None:
    assert DOCS.read_text() == text(found), "make it anew: make docs"


def test_t5_alone_is_cached_by_what_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with place(tmp_path):
        monkeypatch.setattr("sfumato.families.detect.detect_file", lambda _: SimpleNamespace(family="sd3"))
        words = [*(f"--{name}={value}" for name, value in BASE.items()), "--use_t5xxl_cache_only"]
        found = kohya.resolve("sd3_train", words)
        assert found.config.data.cache_text_encoder_outputs
        assert any(n.startswith("--use_t5xxl_cache_only: read as cache_text_encoder") for n in found.notices)
        found = kohya.resolve("sd3_train", [*words, "--train_text_encoder"])
        assert not found.config.data.cache_text_encoder_outputs and found.config.train.train_text_encoder
        assert any(n.startswith("--use_t5xxl_cache_only: accepted, no effect: text enc") for n in found.notices)
        with pytest.raises(UserError, match="--use_t5xxl_cache_only: is a setting of kohya's"):
            flags.resolve_all(words, "full")


if __name__ == "__main__":
    print(text(table()), end="")
