"""Resizing, pixels and colours."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from folders import noise
from PIL import Image
from torch.nn import functional

from sfumato.data import augment


def test_pixels_run_from_minus_one_to_one() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    values = augment.pixels(image)
    assert values.shape == (3, 2, 3)
    assert values[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


def test_shrinking_averages_areas() -> None:
    image = noise((64, 32), 1)
    oracle = functional.avg_pool2d(augment.pixels(image)[None], 4)[0]
    assert torch.allclose(augment.pixels(augment.resize(image, (16, 8))), oracle, atol=1.1 / 127.5)


@pytest.mark.parametrize("size", [(128, 64), (32, 64), (128, 16)])
def test_a_side_that_grows_asks_for_lanczos(size: tuple[int, int]) -> None:
    image = noise((64, 32), 2)
    assert np.array_equal(augment.resize(image, size), image.resize(size, Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("name", "kind"), [("nearest", Image.Resampling.NEAREST), ("cubic", Image.Resampling.BICUBIC), ("area", Image.Resampling.BOX)]
)
def test_interpolation_as_told(name: Any, kind: Image.Resampling) -> None:
    image = noise((64, 32), 3)
    assert np.array_equal(augment.resize(image, (90, 20), name), image.resize((90, 20), kind))


def test_colours_vary_one_picture_in_three_and_slightly() -> None:
    image = Image.new("RGB", (2, 2), (200, 90, 40))
    seen = [np.asarray(augment.vary_colours(image, random.Random(seed))) for seed in range(600)]
    changed = [np.abs(a.astype(int) - np.asarray(image)).max() for a in seen if not np.array_equal(a, image)]
    assert 140 < len(changed) < 250
    assert max(changed) < 60


def test_a_mask_is_the_mean_over_a_latent_pixel() -> None:
    image = Image.new("L", (16, 8), 0)
    image.paste(255, (0, 0, 4, 8))
    assert augment.mask(image, 8).tolist() == [[[0.5, 0.0]]]
