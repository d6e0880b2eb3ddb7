"""Sizes that images are brought to: pure arithmetic, the same as sd-scripts'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from sfumato.config.data import BucketOptions
from sfumato.data.batch import Size

Crop = tuple[int, int]
"""(left, top) of what is cut out of the resized image."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image comes to its bucket: resized to `resized`, then `bucket` is cut out of it. (width, height),
    pixels."""

    bucket: Size
    resized: Size

    @property
    def trim(self) -> Size:
        """Pixels cut away in all, in width and in height."""
        return self.resized[0] - self.bucket[0], self.resized[1] - self.bucket[1]

    @property
    def centre(self) -> Crop:
        """The crop at the centre."""
        return self.trim[0] // 2, self.trim[1] // 2

    def box(self, crop: Crop) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a crop, in the resized image."""
        return crop[0], crop[1], crop[0] + self.bucket[0], crop[1] + self.bucket[1]

    def mirrored(self, crop: Crop) -> Crop:
        """Where the same cut lies when the resized image is mirrored."""
        return self.trim[0] - crop[0], crop[1]


def resolutions(options: BucketOptions) -> tuple[Size, ...]:
    """All buckets, sorted by width, then height: `resolution` is an area that none exceeds.

    With `enable_bucket` off, or with `bucket_no_upscale` (where buckets follow from the images), `resolution` alone.
    """
    if not options.enable_bucket or options.bucket_no_upscale:
        return (options.resolution,)
    (low, high), step = options.bucket_limits, options.bucket_reso_steps
    area = options.resolution[0] * options.resolution[1]
    square = int(sqrt(area) // step) * step
    found = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(high, area // width // step * step)
        if height >= low:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def place(size: Size, options: BucketOptions, buckets: Sequence[Size] | None = None) -> Placement:
    """The bucket of an image of this (width, height), and how it gets there. `buckets`: `resolutions(options)`, worked
    out once.

    Raises ValueError for an image that is too small or too long for any bucket.
    """
    if options.enable_bucket and options.bucket_no_upscale:
        return _place_without_enlarging(size, options)
    buckets = resolutions(options) if buckets is None else buckets
    width, height = size
    ratio = width / height
    # The sorted order decides ties: the narrowest bucket wins, as in sd-scripts.
    bucket = size if size in buckets else min(buckets, key=lambda b: abs(b[0] / b[1] - ratio))
    scale = bucket[1] / height if ratio > bucket[0] / bucket[1] else bucket[0] / width
    resized = int(width * scale + 0.5), int(height * scale + 0.5)
    if resized[0] * resized[1] > LARGEST:
        there = f"{resized[0]}x{resized[1]} before it is cut to {bucket[0]}x{bucket[1]}"
        raise ValueError(f"{width}x{height} would be {there}, more than fits in memory: crop it")
    return Placement(bucket, resized)


LARGEST = 2**29
"""Pixels of an image once it is resized: 1.5 GB. Only an image a thousand times as long as it is wide comes near."""


def _place_without_enlarging(size: Size, options: BucketOptions) -> Placement:
    step, area = options.bucket_reso_steps, options.resolution[0] * options.resolution[1]
    resized = size if size[0] * size[1] <= area else _shrunk(size, area, step)
    bucket = resized[0] // step * step, resized[1] // step * step
    if not all(bucket):
        raise ValueError(
            f"{size[0]}x{size[1]} would be {resized[0]}x{resized[1]}, and no side of a bucket is below "
            f"bucket_reso_steps ({step}); "
            "enlarge or crop it, lower bucket_reso_steps, or leave bucket_no_upscale out"
        )
    return Placement(bucket, resized)


def _shrunk(size: Size, area: int, step: int) -> Size:
    """The size of at most `area` with one side a multiple of `step`: the side that changes the aspect ratio of the
    bucket less."""

    def to_steps(x: float) -> int:
        return int(x + 0.5) // step * step

    ratio = size[0] / size[1]
    width = to_steps(sqrt(area * ratio))
    height = to_steps(area / sqrt(area * ratio))
    by_width = (width, int(width / ratio + 0.5))
    by_height = (int(height * ratio + 0.5), height)

    def error(bucket: Size) -> float:
        return abs(bucket[0] / bucket[1] - ratio) if all(bucket) else float("inf")

    wider = error((width, to_steps(width / ratio))) < error((to_steps(height * ratio), height))
    return by_width if wider else by_height


def check(options: BucketOptions, multiple: int) -> list[str]:
    """What is wrong with the options, one message each. `multiple`: what sides must be multiples of, in pixels."""
    width, height = options.resolution
    if not options.enable_bucket:
        fits = min(width, height) >= multiple and not width % multiple and not height % multiple
        return [] if fits else [f"resolution {width},{height}: both sides must be multiples of {multiple}"]
    step = options.bucket_reso_steps
    if step < multiple or step % multiple:
        return [f"bucket_reso_steps {step} must be a multiple of {multiple}"]
    wrong = []
    if sqrt(width * height) < step:
        wrong.append(f"resolution {width},{height} is below bucket_reso_steps {step}: lower bucket_reso_steps")
    if options.bucket_no_upscale:
        return wrong
    low, high = options.bucket_limits
    if min(width, height) < min(low, options.min_bucket_reso):
        wrong.append(
            f"resolution {width},{height} is below min_bucket_reso {options.min_bucket_reso}: lower min_bucket_reso"
        )
    if max(width, height) > high:
        wrong.append(
            f"resolution {width},{height} is above max_bucket_reso {options.max_bucket_reso}: raise max_bucket_reso"
        )
    return wrong
