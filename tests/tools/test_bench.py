"""`sfumato bench`: steps of models with random weights, as the settings ask for them, and figures beside older ones."""

from __future__ import annotations

import json
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tinies.cases import cases

from sfumato import families
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.models.meta_init import shapes
from sfumato.tools import bench
from sfumato.train import bench as steps
from sfumato.train import outlines

HERE = patch.object(bench, "apart", lambda case, limit: steps.measure(case))
"""In this process: one of its own takes seconds to start."""


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(c for c in cases() if c.family == "chroma").write(tmp_path_factory.mktemp("chroma")).model


@pytest.mark.parametrize("family", families.names())
def test_usual_models_are_outlined_with_fewer_blocks(family: str, tmp_path: Path) -> None:
    parts = outlines.usual(family)
    assert outlines.fewer(parts["denoiser"], 1.0) == dict(parts["denoiser"])
    part = {**parts, "denoiser": outlines.fewer(parts["denoiser"], 0.1)}
    models = outlines.outline_of(families.family(family), families.facts(family).options(), part, tmp_path)
    held = shapes(models.denoiser.state_dict())
    assert held == part["denoiser"]
    assert (len(held) == len(parts["denoiser"])) == (family == "sd"), "no list of its U-Net has three blocks alike"


def test_steps_are_measured_as_the_settings_ask(
    chroma: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes memory alone changes no loss, and a later run is compared with this one."""
    monkeypatch.setattr(steps, "MATMUL", {"cpu": 256})
    monkeypatch.setattr(steps, "COPIED", {"cpu": 1 << 16})
    out, network = tmp_path / "a.json", ["--network_dim", "2", "--resolution", "64", "--rounds", "1", "--steps", "1"]
    words = ["bench", "network", "--model", str(chroma), *network, "--json", str(out), "--setting", ""]
    with HERE:
        assert main([*words, "--setting", "--gradient_checkpointing --blocks_to_swap 1"]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    plain, spared = found["rows"]
    assert plain["loss"] == pytest.approx(spared["loss"], rel=1e-5)
    assert spared["flop_per_step"] > plain["flop_per_step"] > 0 and spared["streamed"] > plain["streamed"] == 0
    assert plain["trained"] < plain["parameters"] / 10 and min(plain["phases"].values()) > 0
    assert sum(plain["phases"].values()) < 60 and 0 < plain["share_of_matmul"] < 1
    assert {"torch", "cpu", "memory", "platform"} <= found["machine"].keys()
    capsys.readouterr()
    with HERE:
        assert main([*words, "--setting", "--fused_backward_pass", "--compare", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "s/step" in shown[0] and shown[1].startswith("model network") and "x " in shown[2]
    assert "--fused_backward_pass" in shown[3] and len(shown) == 4, "it was not measured before"


def test_a_control_net_follows_made_up_images(chroma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MATMUL", {"cpu": 256})
    monkeypatch.setattr(steps, "COPIED", {"cpu": 1 << 16})
    words = ["--resolution", "64", "--rounds", "1", "--steps", "1", "--json", str(tmp_path / "a.json")]
    with HERE:
        assert main(["bench", "controlnet", "--model", str(chroma), *words, "--control_net_lr", "0.1"]) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["rows"]
    assert row["trained"] > row["parameters"] / 10


def test_a_case_that_failed_is_a_line_and_the_others_have_ratios() -> None:
    rows = [
        {"model": "a", "method": "full", "setting": "", "error": "no"},
        {"model": "b", "method": "full", "setting": "", "seconds_per_step": 1.0, "phases": {"data": 0.5}},
    ]
    lines = bench.table(rows, [{**rows[1], "seconds_per_step": 2.0}]).splitlines()
    assert lines[1].split() == ["a", "full", "failed:", "no"] and "x 0.50" in lines[3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--families", "sdx"], "there is no family 'sdx'"),
        (["--families", "flux:big"], "flux: there is no 'big'"),
        (["--families", "flux", "--scale", "0"], "--scale 0: expected more than 0"),
        (["--families", "flux", "--train_data_dir", "x"], "--train_data_dir: "),
        (["--families", "flux", "--setting", "", "--setting", "--nonsense"], "error: --nonsense: unknown flag"),
        ([], "say what is measured"),
        (["--families", "flux", "--compare", "nothing.json"], "nothing.json: not a file of"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: Any) -> None:
    assert main(["bench", "network", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "note: 1 of" not in told


@pytest.mark.parametrize(
    ("raised", "told"), [(UserError("a", "b"), "a; b"), (RuntimeError("no room\nmore"), "RuntimeError: no room")]
)
def test_what_ends_a_case_is_its_row(raised: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: object) -> None:
        raise raised

    monkeypatch.setattr(steps, "measure", fails)
    ours, theirs = Pipe()
    bench._measured(None, theirs)  # type: ignore[arg-type]
    assert ours.recv() == {"error": told}
