"""A base model that is a header and zeros, and a folder of images, without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_files import SHAPES, safetensors
from PIL import Image


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `base.safetensors`, `images/` with one image, `more/` with none, `data.toml`."""
    safetensors(tmp_path / "base.safetensors", SHAPES)
    (tmp_path / "images").mkdir()
    (tmp_path / "more").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a")
    (tmp_path / "data.toml").write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "images"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path
