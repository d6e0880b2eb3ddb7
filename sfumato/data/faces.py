"""Faces that the names of image files tell, and cuts around them: face_crop_aug_range."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sfumato.config import SubsetConfig
from sfumato.config.data import ImageOptions
from sfumato.data.batch import Size
from sfumato.data.buckets import Crop, Placement
from sfumato.errors import UserError

_NAMED = re.compile(r".+_(\d+)_(\d+)_(\d+)_(\d+)", re.DOTALL)
Face = tuple[int, int, int]
"""Centre x and y and the longer side, in pixels of the image."""


def face(path: Path) -> Face | None:
    """What the name of an image tells, as sd-scripts' tool writes it: `name_x_y_width_height.png`, x and y the
    centre."""
    if (found := _NAMED.fullmatch(path.stem)) is None:
        return None
    x, y, width, height = map(int, found.groups())
    return (x, y, max(width, height)) if width or height else None


def notes(subsets: Iterable[tuple[SubsetConfig, Sequence[Path]]]) -> list[str]:
    """What the user should know of the faces of each subset's images. Errors: `UserError` where no name tells one, so
    that face_crop_aug_range would do nothing."""
    asked = [(subset, paths) for subset, paths in subsets if subset.face_crop_aug_range and paths]
    bare = [(subset, paths, [path.name for path in paths if face(path) is None]) for subset, paths in asked]
    if bare and all(len(without) == len(paths) for _, paths, without in bare):
        raise UserError(
            f"{asked[0][0].source}: face_crop_aug_range: no image's name tells where its face is, as name_x_y_w_h.png "
            f"does ({asked[0][1][0].name}, for one): leave it out"
        )
    return [
        f"{subset.source}: {len(without)} images have no face in their names and are cut as without "
        f"face_crop_aug_range ({', '.join(without[:5])}{' ...' if len(without) > 5 else ''})"
        for subset, _, without in bare
        if without
    ]


def around(
    size: Size, face: Face, placement: Placement, options: ImageOptions, rng: random.Random
) -> tuple[Placement, Crop]:
    """How an image of this size is resized so that the bucket's shorter side is so many times the face as
    face_crop_aug_range says, and where the bucket is cut out around the face. The image is never enlarged for that, and
    always fills the bucket.

    The place is moved a little by chance, or with random_crop up to the edges. Source: sd-scripts' `crop_target`.
    """
    low, high = options.face_crop_aug_range or (1.0, 1.0)
    bucket, short = placement.bucket, min(placement.bucket)
    filled = max(bucket[0] / size[0], bucket[1] / size[1])
    smallest = max(filled, min(1.0, short / (face[2] * high)))
    scale = rng.uniform(smallest, max(smallest, min(1.0, short / (face[2] * low))))
    resized = max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5))
    nudge = face[2] // 20 if low != high and face[2] >= max(40, short // 10 + 1) else 0
    crop = [_start(int(face[i] * scale + 0.5), resized[i], bucket[i], options.random_crop, nudge, rng) for i in (0, 1)]
    return Placement(bucket, resized), (crop[0], crop[1])


def _start(middle: int, side: int, length: int, anywhere: bool, nudge: int, rng: random.Random) -> int:
    """Where to cut `length` out of `side` around `middle`."""
    far = max(side - middle, middle)
    moved = rng.randint(0, far) + rng.randint(0, far) - far if anywhere else rng.randint(-nudge, nudge)
    return max(0, min(middle - length // 2 + moved, side - length))
