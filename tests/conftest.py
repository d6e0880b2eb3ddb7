"""Puts this folder on the path, so that every test can `import tiny`, and reads the key tables of real files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

KEYS = Path(__file__).with_name("fixtures") / "keys"


@pytest.fixture(scope="session")
def keys() -> Callable[[str], dict[str, tuple[int, ...]]]:
    """Name of a real file -> {tensor name: shape}."""
    return lambda name: {k: tuple(v) for k, v in json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes())).items()}
