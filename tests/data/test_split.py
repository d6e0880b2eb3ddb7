"""What is held out of training, and what of it is measured."""

from __future__ import annotations

import math
import random
from pathlib import Path
from shutil import copy

import pytest
from folders import dataset, folder, plan, subset

from sfumato.data import captions
from sfumato.data.held_out import evaluation
from sfumato.data.plan import Plan
from sfumato.errors import UserError


def names(of: Plan, held: bool) -> list[str]:
    return [item.image.path.name for item in (of.held_out if held else of.items)]


def as_sd_scripts(paths: list[str], split: float, seed: int, *, training: bool) -> list[str]:
    """The formulas of sd-scripts 0.9 (its reference, part 8: "validation split formulas ceil/round")."""
    random.Random(seed).shuffle(paths)
    if training:
        return paths[: math.ceil(len(paths) * (1 - split))]
    return paths[len(paths) - round(len(paths) * split) :]


@pytest.mark.parametrize("split", [0.1, 0.25, 0.35, 0.5])
def test_the_held_out_images_are_sd_scripts_and_none_is_trained_on(tmp_path: Path, split: float) -> None:
    root = folder(tmp_path / "a", [(64, 64)] * 10)
    made = plan(dataset(subset(root, validation_split=split, validation_seed=7, num_repeats=3)))
    paths = sorted(path.name for path in root.glob("*.png"))
    held = as_sd_scripts(list(paths), split, 7, training=False)
    train = as_sd_scripts(list(paths), split, 7, training=True)
    assert sorted(names(made, True)) == sorted(held)
    assert sorted(names(made, False)) == sorted({*train} - {*held}) == sorted({*paths} - {*held})
    assert {item.repeats for item in made.items} == {3} and {item.repeats for item in made.held_out} == {1}
    assert f"{len(held)} of 10 images are held out" in " ".join(made.notes)


def test_an_image_is_on_one_side_wherever_it_stands(tmp_path: Path) -> None:
    """Copies, the folder in a second dataset, and what is to stay as it is, which is never held out itself."""
    root, other = folder(tmp_path / "a", [(64, 64)] * 4), folder(tmp_path / "b", [(64, 64)] * 2, seed=9)
    copy(root / "0.png", other / "copy.png")
    reg = folder(tmp_path / "reg", [(64, 64)], seed=20)
    copy(root / "1.png", reg / "copy.png")
    made = plan(
        dataset(subset(other), subset(reg, is_reg=True, validation_split=1.0)),
        dataset(subset(root), resolution=(96, 96)),
        dataset(subset(root, custom_attributes={"diff_output_preservation": True}, validation_split=1.0)),
        dataset(subset(root, validation_split=1.0)),
    )
    assert {item.image.path.parent.name for item in made.held_out} == {"a"} and len(made.held_out) == 4
    assert {item.image.path.parent.name for item in made.items} == {"b", "reg"}
    assert "copy.png" not in names(made, False)
    assert f"{reg}: validation_split: no effect where nothing is learnt" in made.notes
    assert {skip.path.name for skip in made.skipped if "held out" in skip.reason} == {
        "copy.png", "0.png", "1.png", "2.png", "3.png",
    }  # fmt: skip


def test_a_split_that_holds_nothing_out_or_leaves_nothing_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    with pytest.raises(UserError, match=r"holds no image out \(0\.05 of 5 images in .*\): raise it"):
        plan(dataset(subset(root, validation_split=0.05)))
    with pytest.raises(UserError, match="left to train on: validation_split holds all 5 images out"):
        plan(dataset(subset(root, validation_split=1.0)))


def test_what_is_measured_is_whole_and_as_many_of_each(tmp_path: Path) -> None:
    root, reg = folder(tmp_path / "a", [(64, 64)] * 9), folder(tmp_path / "reg", [(64, 64)], seed=30)
    options = {"caption_dropout_rate": 0.5, "shuffle_caption": True, "token_warmup_step": 4, "flip_aug": True}
    made = plan(dataset(subset(root, validation_split=0.5, num_repeats=2, **options), subset(reg, is_reg=True)))
    whole, some = evaluation(made), evaluation(made, 1)
    assert whole and some and evaluation(made) == whole
    assert whole.held_out == made.held_out == whole.items[:4] and len(some.held_out) == 2 and len(some.items) == 4
    assert {item.image.path for item in whole.items[4:]} < {i.image.path for i in made.items if not i.image.is_reg}
    assert {item.repeats for item in whole.items} == {1} and len(whole.items) == 8
    assert not captions.endless(whole.subset(whole.items[0])) and whole.subset(whole.items[0]).flip_aug
    assert evaluation(plan(dataset(subset(root)))) is None
