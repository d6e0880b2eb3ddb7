"""Small images and what OpenCV makes of them in other sizes: `python tests/data/resizing.py` writes the fixture anew.

The stored numbers are those of OpenCV 4.10.0, which sd-scripts pins.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

FIXTURE = Path(__file__).parents[1] / "fixtures" / "resized.npz"
SHRINKING = 50
KINDS = {"area": "INTER_AREA", "bicubic": "INTER_CUBIC", "bilinear": "INTER_LINEAR"}

Case = tuple[str, str, tuple[int, int], tuple[int, int]]
"""Name, interpolation, size before, size after."""


def image(size: tuple[int, int]) -> NDArray[np.uint8]:
    """(h, w, 3): stripes of three pixels, a slope, and numbers without order."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    stripes, slope, rough = (
        (x // 3 + y // 3) % 2 * 255,
        (x * 3 + y * 2) % 256,
        (x * x * 7 + y * y * 13 + x * y * 5) % 251,
    )
    return np.dstack([stripes, slope, rough]).astype(np.uint8)


def cases() -> list[Case]:
    """50 sizes that shrink by the average of areas; then sides that grow, and the other kinds both ways."""
    rng, found = Random(7), []
    for i in range(SHRINKING):
        before = rng.randint(20, 90), rng.randint(20, 90)
        after = max(4, round(before[0] * rng.uniform(0.2, 1))), max(4, round(before[1] * rng.uniform(0.2, 1)))
        before, after = (
            ((46, 34), (23, 17)) if i == 0 else ((22, 61), (22, 17)) if i == 1 else (before, after)
        )  # by half; one side alone
        found.append((f"shrink{i}", "area", before, (min(after[0], 24), min(after[1], 24))))
    for kind in KINDS:
        found += [(f"{kind}{i}", kind, (17, 13), after) for i, after in enumerate([(25, 30), (34, 26), (30, 9)])]
    found += [(f"{kind}-shrink", kind, (60, 50), (41, 19)) for kind in ("bicubic", "bilinear")]
    return found


if __name__ == "__main__":
    import cv2

    made = {
        name: cv2.resize(image(before), after, interpolation=getattr(cv2, KINDS[kind]))
        for name, kind, before, after in cases()
    }
    np.savez_compressed(FIXTURE, **made)
