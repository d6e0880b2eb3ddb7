"""A run without a state that goes on from weights."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file
from training import Train, config

from sfumato.errors import UserError
from sfumato.train.loop import StepBudget

PLAIN: dict[str, Any] = {"optimizer_type": "torch.optim.SGD", "lr_scheduler": "cosine", "max_train_epochs": 2}
"""An optimizer that remembers nothing, with a schedule; three steps an epoch."""


def test_a_run_from_weights_goes_on_as_if_it_had_not_been_cut(train: Train) -> None:
    whole = train("whole", save_every_n_steps=4, **PLAIN)
    weights = str(whole / "out-step00000004.safetensors")
    again = train("again", network_weights=weights, initial_step=4, save_every_n_steps=5, **PLAIN)
    here, there = load_file(again / "out.safetensors"), load_file(whole / "out.safetensors")
    assert all(here[key].equal(there[key]) for key in there)
    assert (again / "out-step00000005.safetensors").exists()


def test_epochs_are_counted_from_one() -> None:
    firsts = [StepBudget.of(config(initial_epoch=n, max_train_epochs=4), 5, 1).first for n in (None, 1, 3)]
    assert firsts == [0, 0, 10]
    assert (
        StepBudget.of(config(initial_step=7), 5, 1).text().startswith("1600 steps in 320 epochs, of which 7 count as")
    )


def test_there_must_be_a_step_left(train: Train) -> None:
    with pytest.raises(UserError, match="initial_step, initial_epoch: 6 steps count as done, of 6 in all"):
        train("out", initial_epoch=3, **PLAIN)
