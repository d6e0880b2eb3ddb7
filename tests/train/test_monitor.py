"""What measurements of held-out images are taken to say."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import stdev

import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.train import log, monitor
from sfumato.train.monitor import Point, Verdict, margin, verdict


def points(held_out: list[float], trained: list[float], noise: float = 0.002, images: int = 12) -> list[Point]:
    """A run's points: images differ much among themselves, and little from step to step."""
    rng = random.Random(1)
    own = [rng.uniform(0.1, 0.9) for _ in range(images)]
    made = []
    for i, (held, train) in enumerate(zip(held_out, trained, strict=True)):
        each = [held + x + rng.gauss(0, noise) for x in own]
        made.append(Point(20 * i, i, sum(each) / images, train, tuple(each)))
    return made


def said(held_out: list[float], trained: list[float]) -> Verdict:
    found = verdict(points(held_out, trained))
    assert found
    return found


FALLING = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


@pytest.mark.parametrize(("n", "t"), [(3, 4.303), (5, 2.776), (10, 2.262), (40, 2.023)])
def test_the_interval_is_students(n: int, t: float) -> None:
    """Against the usual table of quantiles, t(0.975; n - 1)."""
    values = [random.Random(n).gauss(0, 1) for _ in range(n)]
    assert margin(values) == pytest.approx(t * stdev(values) / n**0.5, rel=0.11 if n == 3 else 0.01)


def test_it_sees_what_is_learned_by_heart() -> None:
    found = said([0.5, 0.4, 0.3, 0.3005, 0.4, 0.5], FALLING)
    assert found.overfits and found.best.step in (40, 60) and [p.step for p in found.as_good] == [40, 60]
    assert found.gain.fell and found.rise.mean == pytest.approx(0.2, abs=0.01)
    text = found.text()
    assert text.startswith(f"recommended: {found.best.where}") and "overfitting: from there to step 100" in text
    assert "went from" in text and "0.5000" in text


def test_one_image_is_no_evidence() -> None:
    found = verdict(points([0.5, 0.4], [0.5, 0.4], images=1))
    assert found and "on 1 held-out image, " in found.text() and "raise validation_split" in found.text()
    assert found.text().endswith("no overfitting: the last step is the best")


@pytest.mark.parametrize(
    ("held_out", "trained", "says"),
    [
        ([0.5, 0.45, 0.4, 0.35, 0.3, 0.25], FALLING, "a longer training may be better still"),
        ([0.5, 0.4, 0.3, 0.3, 0.3, 0.3], FALLING, "no overfitting"),
        ([0.5, 0.4, 0.3, 0.4, 0.6, 0.9], [1.0, 0.9, 0.8, 1.2, 1.5, 1.9], "the training is not stable"),
        ([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], FALLING, "no step was better than the start"),
    ],
)
def test_it_says_what_else_there_is(held_out: list[float], trained: list[float], says: str) -> None:
    found = said(held_out, trained)
    assert says in found.text() and not (found.overfits and found.best.step)


def test_a_training_that_broke_down_has_risen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss without bounds is no chance; what says it in JSON is JSON, and lines of something else are left out."""
    inf = math.inf
    found = said([0.5, 0.4, 0.3, inf, inf], [1.0, 0.9, 0.8, inf, inf])
    assert found.rise.rose and [p.step for p in found.as_good] == [40, 40] and "not stable" in found.text()
    assert said([inf, 0.4, 0.3], [inf, 0.9, 0.8]).gain.fell and said([inf, inf], [inf, inf]).best.step == 0
    entries: list[dict[str, object]] = [
        {"step": p.step, "epoch": p.epoch, "loss/validation/mean": p.held_out, "loss/validation/trained": p.trained}
        | {"validation": {"held_out": p.images}}
        for p in (found.start, found.best, found.last)
    ]
    odd = [{**entries[0], "epoch": inf}, {**entries[0], "validation": {"held_out": ["a"]}}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, [*odd, *entries, *odd])))
    assert main(["overfit", str(tmp_path / "x.jsonl"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["best"]["step"] == 40 and facts["last"]["images"] == [None] * 12


def test_the_log_of_a_run_is_read_by_the_command_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, made = tmp_path / "me.jsonl", points([0.5, 0.4, 0.3, 0.4, 0.5, 0.6], FALLING)
    lines = [json.dumps({"step": 1, "loss": 0.5, "epoch": 1}), "{cut off"]
    for p in made:
        named = {"mean": p.held_out, "trained": p.trained, "level_1": p.held_out, "level_2": p.trained}
        scalars = {f"{log.PREFIX}{name}": value for name, value in named.items()}
        details = {"validation": {"held_out": [*p.images[:-1], None]}}
        lines.append(json.dumps({"step": p.step, "epoch": p.epoch, **scalars, **details}))
    path.write_text("\n".join(lines), encoding="utf-8")
    assert main(["overfit", str(path)]) == 0 and "recommended: step 40 (epoch 2)" in capsys.readouterr().out
    assert main(["overfit", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["best"]["step"], found["overfits"]) == (40, True)
    log.curve(path, tmp_path / "me.png")
    with Image.open(tmp_path / "me.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
        assert image.width > 1200 and {(208, 64, 32), (32, 128, 80)} <= colours
    path.write_text(lines[0], encoding="utf-8")
    assert main(["overfit", str(path)]) == 2 and "train with validation_split" in capsys.readouterr().err
    assert main(["overfit", str(tmp_path / "none.jsonl")]) == 2


def test_a_log_is_of_numbers_where_trackers_read_it(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Tracker:
        def write(self, step: int, values: dict[str, float]) -> None:
            seen.append(values)

    made = log.Log.__new__(log.Log)
    made.sinks, made.mishaps = [Tracker(), log.Lines(tmp_path / "me.jsonl", 0)], log.Mishaps()  # type: ignore[list-item]
    made.write(3, {"validation": [1, 2]}, **{f"{log.PREFIX}mean": 0.5})
    made.sinks[1].close()
    assert seen == [{"loss/validation/mean": 0.5}]
    assert json.loads((tmp_path / "me.jsonl").read_text(encoding="utf-8")) == {
        "step": 3, "loss/validation/mean": 0.5, "validation": [1, 2],
    }  # fmt: skip
    assert monitor.points(tmp_path / "me.jsonl") == []
