"""The usual models of the families, by which adapters are read without a model, are those of the real files' tables."""

from __future__ import annotations

import pytest
import usual_models
from tinies.cases import modules

from sfumato.models import reference


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.__name__.removeprefix("tinies."))
def test_usual_models_are_those_of_the_real_files(module: object) -> None:
    """A family without `USUAL` has none: its adapters are converted with --model alone."""
    name = getattr(module, "__name__", "").removeprefix("tinies.")
    expected = usual_models.of(name) if hasattr(module, "USUAL") else {}
    assert reference.usual_models(usual_models.FAMILIES / name) == expected, f"python tests/usual_models.py {name}"
