"""A run without a state that goes on from weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training import Train

from sfumato.errors import UserError

PLAIN: dict[str, Any] = {"optimizer_type": "torch.optim.SGD", "lr_scheduler": "cosine", "max_train_epochs": 2}
"""An optimizer that remembers nothing, with a schedule; three steps an epoch."""


def test_a_run_from_weights_goes_on_as_if_it_had_not_been_cut(train: Train, tmp_path: Path) -> None:
    whole = train("whole", save_every_n_epochs=1, save_every_n_steps=4, **PLAIN)
    for first, name in (({"initial_epoch": 2}, "out-000001"), ({"initial_step": 4}, "out-step00000004")):
        again = train(name, network_weights=str(whole / f"{name}.safetensors"), save_every_n_steps=5, **first, **PLAIN)
        here, there = load_file(again / "out.safetensors"), load_file(whole / "out.safetensors")
        assert all(here[key].equal(there[key]) for key in there)
        assert (again / "out-step00000005.safetensors").exists()


def test_there_must_be_a_step_left(train: Train) -> None:
    with pytest.raises(UserError, match="initial_step, initial_epoch: 6 steps count as done, of 6 in all"):
        train("out", initial_epoch=3, **PLAIN)
