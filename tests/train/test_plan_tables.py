"""The tables of `sfumato plan` are what is done: images, samples, batches and steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import dataset, folder, plan, subset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sfumato.config import Config, TrainConfig
from sfumato.train.loop import StepBudget
from sfumato.train.plan import bucket_rows, folder_rows, steps_line


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    return folder(root / "a"), folder(root / "b", [(64, 64)] * 3, seed=50)


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_table_is_what_is_done(
    images: tuple[Path, Path],
    repeats: tuple[int, int],
    sizes: tuple[int, int],
    reg: bool,
    accumulation: int,
    world: int,
) -> None:
    a, b = images
    made = plan(
        dataset(subset(a, num_repeats=repeats[0]), subset(b, num_repeats=repeats[1], is_reg=reg), batch_size=sizes[0]),
        dataset(subset(b, num_repeats=repeats[1]), resolution=(96, 96), batch_size=sizes[1]),
    )
    run = Config(train=TrainConfig(gradient_accumulation_steps=accumulation, max_train_epochs=1))
    batches = made.batches(0, 0)
    assume(len(batches) >= world)
    budget = StepBudget.of(run, made.batches_per_epoch, world)
    samples = sum(map(len, batches))
    assert len(batches) == made.batches_per_epoch == sum(row[4] for row in bucket_rows(made))
    assert samples == made.train_samples + made.reg_samples == sum(row[5] for row in folder_rows(made))
    steps = [batches[i : i + accumulation * world] for i in range(0, len(batches), accumulation * world)]
    assert budget.steps_per_epoch == budget.steps == len(steps)
    assert f"= {len(steps)} steps" in steps_line(made, budget)


def test_a_folder_of_several_datasets_is_counted_in_its_own_row(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a"), folder(tmp_path / "a" / "b")
    (b / "1.png").write_bytes(b"")
    data = (dataset(subset(a), subset(b)), dataset(subset(a), subset(b), resolution=(96, 96)))
    rows = folder_rows(plan(*data, skip_unreadable=True))
    assert [row[3] for row in rows] == [5, 4] * 2 and [row[6] for row in rows] == [0, 1] * 2
