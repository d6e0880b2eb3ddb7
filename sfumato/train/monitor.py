"""What the measurements of held-out images say: after which step a training was at its best, and whether it has learned
its images by heart from there on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sfumato.errors import UserError
from sfumato.formats.paths import trouble


@dataclass(frozen=True, slots=True)
class Change:
    """How much a loss has changed, on the mean over the same images on the same noise."""

    mean: float
    margin: float
    """Half of the 95 % confidence interval; infinite for a single image, and for a loss that is not a number."""

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.margin:.4f}" if math.isfinite(self.margin) else f"{self.mean:+.4f}"

    @property
    def rose(self) -> bool:
        """Whether it is more than chance that the loss has risen."""
        return self.mean > self.margin or self.mean == math.inf

    @property
    def fell(self) -> bool:
        """Whether it is more than chance that the loss has fallen."""
        return -self.mean > self.margin or self.mean == -math.inf


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured after one step."""

    step: int
    epoch: int
    held_out: float
    trained: float
    """The loss of as many images that are trained on, at the same noise levels."""
    images: tuple[float | None, ...]
    """Of each held-out image; None: it could not be read."""

    @property
    def where(self) -> str:
        return f"step {self.step} (epoch {self.epoch})" if self.step else "the start"


def margin(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean of values: Student's t by Cornish and Fisher's expansion."""
    n, z = len(values), 1.959964
    if n < 2 or not all(map(math.isfinite, values)):
        return math.inf
    t = z + (z**3 + z) / (4 * (n - 1)) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * (n - 1) ** 2)
    return t * stdev(values) / math.sqrt(n)


def change(before: Point, after: Point) -> Change:
    """From one point to another, image by image: what images differ in does not count."""
    pairs = zip(before.images, after.images, strict=False)
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    if not differences:
        return Change(after.held_out - before.held_out, math.inf)
    return Change(fmean(differences), margin(differences))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which step is recommended, and why."""

    start: Point
    best: Point
    """Of the lowest loss on held-out images."""
    last: Point
    gain: Change
    """From the start to the best."""
    rise: Change
    """From the best to the last."""
    as_good: tuple[Point, Point]
    """The first and the last point around the best that chance alone may part from it."""
    images: int
    still_falling: bool
    """Whether the loss fell until the end."""

    @property
    def overfits(self) -> bool:
        """Whether the loss on held-out images has risen again while that on trained ones fell."""
        return self.rise.rose and self.last.trained < self.best.trained

    def text(self) -> str:
        """In words, with the evidence."""
        b, start, last = self.best, self.start, self.last
        if b == start:
            return (
                f"no step was better than {start.where} on {self.images} held-out images: their loss was "
                f"{start.held_out:.4f}, and {last.held_out:.4f} after {last.where}; lower the learning rate, or look "
                "at what differs between them and the images that are trained on"
            )
        lines = [
            f"recommended: {b.where}: loss {b.held_out:.4f} on {self.images} held-out image{'s' * (self.images != 1)}, "
            f"{self.gain} from the start"
        ]
        if self.images == 1:
            lines.append("one image does not tell what is chance: raise validation_split or max_validation_steps")
        first, end = self.as_good
        if first != end:
            lines.append(f"as good but for chance: {first.where} to {end.where}")
        if self.overfits:
            lines.append(
                f"overfitting: from there to {last.where} the held-out images' loss changed by {self.rise}, while that "
                f"of images that are trained on, at the same noise levels, went from {b.trained:.4f} to "
                f"{last.trained:.4f}"
            )
        elif self.rise.rose:
            lines.append(f"worse since then, {self.rise}, on trained images too: the training is not stable")
        elif self.still_falling:
            lines.append("no overfitting: the loss fell until the end, a longer training may be better still")
        elif b == last:
            lines.append("no overfitting: the last step is the best")
        else:
            lines.append(f"no overfitting: to {last.where} the loss changed by {self.rise}")
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """The same for scripts."""
        return {**_finite(asdict(self)), "overfits": self.overfits}


def _finite(value: Any) -> Any:
    """Without what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict(points: Sequence[Point]) -> Verdict | None:
    """What the points say, in their order; None for fewer than two."""
    if len(points) < 2:
        return None
    place = min(range(len(points)), key=lambda i: (not math.isfinite(points[i].held_out), points[i].held_out))
    best, last = points[place], points[-1]
    low = high = place
    while low > 1 and not change(best, points[low - 1]).rose:
        low -= 1
    while high < len(points) - 1 and not change(best, points[high + 1]).rose:
        high += 1
    return Verdict(
        start=points[0],
        best=best,
        last=last,
        gain=change(points[0], best),
        rise=change(best, last),
        as_good=(points[low], points[high]),
        images=len(best.images),
        still_falling=place == len(points) - 1 and change(points[-2], last).fell,
    )


def points(log: Path) -> list[Point]:
    """The measurements in a run's log, `NAME.jsonl`, by step. Errors: `UserError` if there is no such file."""
    if wrong := trouble(log):
        raise UserError(f"{log}: {wrong}")
    found: dict[int, Point] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            point = Point(
                step=int(entry["step"]),
                epoch=int(entry["epoch"]),
                held_out=float(entry["loss/validation/mean"]),
                trained=float(entry["loss/validation/trained"]),
                images=tuple(None if x is None else float(x) for x in entry["validation"]["held_out"]),
            )
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            continue  # a line of something else, or one that a crash cut off
        found[point.step] = point
    return [found[step] for step in sorted(found)]


def read(log: Path) -> Verdict:
    """What a run's log says. Errors: `UserError` if it holds too little."""
    said = verdict(points(log))
    if said is None:
        raise UserError(
            f"{log}: it holds no two measurements of held-out images; train with validation_split, and this tells "
            "which step to take"
        )
    return said
