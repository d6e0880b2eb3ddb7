from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfumato import train
from sfumato.cli import adapter_reference, loads_in, reference
from sfumato.cli.main import COMMANDS, guarded, main
from sfumato.train import pipeline, run

BASE = ["--pretrained_model_name_or_path", "base.safetensors", "--dataset_config", "data.toml"]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and main([]) == 0
    assert all(f"  {name} " in capsys.readouterr().out for name in list(COMMANDS)[:1])
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("sfumato ")


def test_help_tells_the_methods_and_the_flags_of_the_one_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for words in (["train"], ["train", "embedding"]):
        with pytest.raises(SystemExit, match="0"):
            main([*words, "--help"])
        said.append(capsys.readouterr().out)
    assert "sfumato train lllite " in said[0] and "--network_dim" in said[0] and "--learning_rate_te" not in said[0]
    assert "--token_string" in said[1] and "--network_dim" not in said[1] and "control:" not in said[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train"], "say what to train"),
        (["train", "netwrk"], "expected one of network, full, embedding, controlnet, lllite; did you mean 'network'?"),
        (["show"], "required: FILE"),
        (["show", "nothing.safetensors"], "nothing.safetensors"),
        (["sample", "--learning_rate", "1"], "--learning_rate: is not a flag of `sfumato sample`"),
        (["sample", *BASE[:2]], "say what to sample: --prompt, or --sample_prompts"),
    ],
)
def test_mistakes_exit_with_2(argv: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and "Traceback" not in said


def test_commands_hand_over_the_config(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        run,
        "train",
        lambda config, method, datasets, resolved, read, given: calls.append(("train", method, len(datasets))),
    )
    monkeypatch.setattr(
        train,
        "plan",
        SimpleNamespace(show=lambda config, method, datasets, *_: calls.append(("plan", method, len(datasets)))),
        raising=False,
    )
    monkeypatch.setattr(run, "cache", lambda config, datasets, method: calls.append(("cache", method, len(datasets))))
    monkeypatch.setattr(pipeline, "main", lambda config, *_: [Path(config.sample.sample_prompts)])
    Path("prompts.txt").write_text("a cat\n")
    for argv in (
        ["train", "full", *BASE],
        ["plan", *BASE],
        ["cache", *BASE, "--cache_latents_to_disk"],
        ["sample", *BASE[:2], "--sample_prompts", "prompts.txt"],
    ):
        assert main(argv) == 0
    assert calls == [("train", "full", 1), ("plan", "network", 1), ("cache", "network", 1)]


@pytest.mark.parametrize("memory", [[], ["--cache_latents"]])
def test_cache_refuses_to_keep_nothing(memory: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *BASE, *memory]) == 2
    assert "nothing would be kept: set cache_latents_to_disk" in capsys.readouterr().err


def test_unexpected_errors_keep_their_traceback_and_interrupts_exit_with_130() -> None:
    def broken() -> int:
        raise ZeroDivisionError

    def stopped() -> int:
        raise KeyboardInterrupt

    with pytest.raises(ZeroDivisionError):
        guarded(broken)
    assert guarded(stopped) == 130


def test_show_says_what_a_file_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "base.safetensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["family"]) == ("checkpoint", "sd")


def test_the_page_of_options_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "options.md"
    assert page.read_text(encoding="utf-8") == reference.page(), (
        "run `python -m sfumato.cli.reference > docs/options.md`"
    )


def test_the_page_of_what_loads_where_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "loads-in.md"
    assert page.read_text(encoding="utf-8") == loads_in.page(), (
        "run `python -m sfumato.cli.loads_in > docs/loads-in.md`"
    )


def test_the_page_of_adapters_is_up_to_date() -> None:
    """Every kind and every family is on it by itself."""
    page = Path(__file__).parents[2] / "docs" / "adapters.md"
    assert page.read_text(encoding="utf-8") == adapter_reference.page(), (
        "run `python -m sfumato.cli.adapter_reference > docs/adapters.md`"
    )


def test_names_that_the_terminal_has_no_letters_for_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert guarded(lambda: print("caf\udce9 \u732b") or 0) == 0
    assert shown.getvalue().split() == [rb"caf\udce9", rb"\u732b"]


def test_a_file_that_may_not_be_read_is_told_wherever_it_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    def closed() -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "/data/a.png")

    def broken() -> int:
        raise OSError("no file is named")  # a fault of the program keeps its traceback

    assert guarded(closed) == 2
    assert capsys.readouterr().err == "error: /data/a.png: Permission denied\n"
    with pytest.raises(OSError, match="no file"):
        guarded(broken)
