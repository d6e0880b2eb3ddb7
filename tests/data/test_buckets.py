"""Buckets against a brute force of the rules, and against sizes worked out by hand."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.config.data import BucketOptions
from sfumato.data.buckets import check, place, resolutions

SD = BucketOptions(enable_bucket=True)
FREE = BucketOptions(enable_bucket=True, bucket_no_upscale=True)


def brute_force(resolution: tuple[int, int], low: int, high: int, step: int) -> list[tuple[int, int]]:
    """Every (width, height) on the grid, kept when it is the largest of its width or of its height that the area allows."""
    area = resolution[0] * resolution[1]
    sides = [s for s in range(low, high + 1) if s % step == 0]
    fits = {(w, h) for w in sides for h in sides if w * h <= area}
    tallest = {w: max((h for (v, h) in fits if v == w), default=0) for w in sides}
    found = {(w, h) for w, h in tallest.items() if h}
    square = max(s for s in range(step, isqrt(area) + 1) if s % step == 0)
    return sorted(found | {(h, w) for w, h in found} | {(square, square)})


@pytest.mark.parametrize(
    ("resolution", "low", "high", "step"),
    [
        ((512, 512), 256, 1024, 64),
        ((1024, 1024), 256, 2048, 64),
        ((768, 512), 320, 960, 64),
        ((64, 64), 32, 128, 16),
        ((512, 512), 256, 1024, 8),
    ],
)
def test_buckets_are_those_of_the_rules(resolution: tuple[int, int], low: int, high: int, step: int) -> None:
    options = BucketOptions(
        enable_bucket=True, resolution=resolution, min_bucket_reso=low, max_bucket_reso=high, bucket_reso_steps=step
    )
    assert list(resolutions(options)) == brute_force(resolution, low, high, step)


def test_buckets_of_512() -> None:
    """The list that every user of sd-scripts has seen in the log."""
    assert resolutions(SD) == (
        (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
        (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "centre"),
    [
        ((512, 512), (512, 512), (512, 512), (0, 0)),
        ((448, 576), (448, 576), (448, 576), (0, 0)),
        ((1920, 1080), (640, 384), (683, 384), (21, 0)),  # 16:9 is nearer to 640x384 (1.67) than to 704x320 (2.2)
        ((1000, 1500), (384, 640), (427, 640), (21, 0)),
        ((100, 100), (512, 512), (512, 512), (0, 0)),  # enlarged
        ((333, 100), (832, 256), (852, 256), (10, 0)),
    ],
)
def test_places(
    size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int], centre: tuple[int, int]
) -> None:
    ratio = Fraction(*size)
    nearest = min(resolutions(SD), key=lambda b: abs(Fraction(*b) - ratio))
    placed = place(size, SD)
    assert (placed.bucket, placed.resized, placed.centre) == (bucket, resized, centre)
    assert nearest == bucket


@given(st.integers(20, 4000), st.integers(20, 4000))
@settings(deadline=None, max_examples=200)
def test_a_bucket_is_always_within_the_resized_image(width: int, height: int) -> None:
    placed = place((width, height), SD)
    assert placed.trim[0] >= 0
    assert placed.trim[1] >= 0
    assert 0 in placed.trim
    left, top, right, bottom = placed.box(placed.centre)
    assert (right - left, bottom - top) == placed.bucket
    assert placed.mirrored(placed.mirrored(placed.centre)) == placed.centre


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((300, 200), (256, 192), (300, 200)),  # small: left as it is, cut to steps
        ((64, 4000), (64, 3968), (64, 4000)),  # no clamp to max_bucket_reso
        ((1024, 1024), (512, 512), (512, 512)),
        ((999, 1000), (512, 512), (512, 513)),  # 511.7 counts as 512
        (
            (1920, 1080),
            (640, 384),
            (683, 384),
        ),  # width to steps: 640x320 (2.0); height to steps: 640x384 (1.67), nearer to 1.78
    ],
)
def test_places_without_enlarging(size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int]) -> None:
    placed = place(size, FREE)
    assert (placed.bucket, placed.resized) == (bucket, resized)


@given(st.integers(64, 3000), st.integers(64, 3000))
@settings(deadline=None, max_examples=200)
def test_nothing_is_enlarged_then(width: int, height: int) -> None:
    try:
        placed = place((width, height), FREE)
    except ValueError:
        assert max(width, height) > 30 * min(width, height)  # only a ribbon has no bucket
        return
    assert placed.resized[0] <= width + 1
    assert placed.resized[1] <= height + 1
    assert not placed.bucket[0] % 64
    assert not placed.bucket[1] % 64
    assert placed.bucket[0] * placed.bucket[1] <= 512 * 512


def test_a_image_smaller_than_a_step_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="bucket_reso_steps"):
        place((40, 300), FREE)


def test_one_size_without_buckets() -> None:
    options = BucketOptions(resolution=(512, 768))
    assert resolutions(options) == ((512, 768),)
    assert place((1000, 1000), options).resized == (768, 768)
    assert place((1000, 1000), options).centre == (128, 0)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (BucketOptions(resolution=(500, 512)), "multiples of 8"),
        (BucketOptions(enable_bucket=True, bucket_reso_steps=20), "bucket_reso_steps"),
        (BucketOptions(enable_bucket=True, resolution=(128, 128)), "min_bucket_reso"),
        (BucketOptions(enable_bucket=True, resolution=(2048, 512)), "max_bucket_reso"),
        (BucketOptions(enable_bucket=True, resolution=(32, 32), min_bucket_reso=32), "bucket_reso_steps"),
    ],
)
def test_options_that_cannot_act_are_reported(options: BucketOptions, word: str) -> None:
    [message] = check(options, 8)
    assert word in message


def test_the_defaults_are_fine() -> None:
    assert check(BucketOptions(), 8) == check(SD, 8) == check(FREE, 8) == []


def test_limits_that_are_no_multiples_are_widened() -> None:
    widened = BucketOptions(enable_bucket=True, min_bucket_reso=300, max_bucket_reso=1000)
    assert resolutions(widened) == resolutions(SD)
