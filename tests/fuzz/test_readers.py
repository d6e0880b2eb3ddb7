"""No input ends in a traceback: hypothesis breaks good inputs of every reader, the same ones each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli.cli_files import SHAPES, safetensors
from hypothesis import HealthCheck, Phase, given, settings
from run_fixtures import make_images

from fuzz.readers import READERS, Reader, Stage
from fuzz.survive import survives

ENOUGH = 5000
"""Inputs in all."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Stage:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "data").mkdir()
    images = make_images(folder / "data").rename(folder / "data" / "2_cat").parent
    return Stage(folder, safetensors(folder / "base.safetensors", SHAPES), model, images)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_no_input_ends_in_a_traceback(reader: Reader, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    tried = []

    @settings(
        max_examples=reader.examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.inputs(stage))
    def attempt(given: Any) -> None:
        tried.append(given)
        survives(lambda: reader.read(stage, given))

    attempt()
    assert len(tried) >= 0.9 * reader.examples


def test_there_are_enough_inputs() -> None:
    assert sum(reader.examples for reader in READERS) >= ENOUGH
