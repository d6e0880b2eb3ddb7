"""Resizing, pixels and colours."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import resizing
import torch
from folders import dataset, noise, plan, subset
from PIL import Image
from torch.nn import functional

from sfumato.data import augment
from sfumato.data.buckets import Placement


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
    ("name", "kind"),
    [("nearest", Image.Resampling.NEAREST), ("lanczos", Image.Resampling.LANCZOS), ("box", Image.Resampling.BOX)],
)
def test_interpolation_as_set(name: Any, kind: Image.Resampling) -> None:
    image = noise((64, 32), 3)
    assert np.array_equal(augment.resize(image, (90, 20), name), image.resize((90, 20), kind))


def test_images_are_resized_as_sd_scripts_resizes_them() -> None:
    """Area averages on 50 sizes, area where a side grows, bicubic and bilinear: within 1/255 of OpenCV's numbers."""
    with np.load(resizing.FIXTURE) as stored:
        expected = dict(stored)
    cases = resizing.cases()
    assert [name for name, *_ in cases] == list(expected)
    assert sum(kind == "area" and name.startswith("shrink") for name, kind, *_ in cases) == 50
    for name, kind, before, after in cases:
        # The default is the average of areas where both sides shrink.
        result = augment.resize(
            Image.fromarray(resizing.image(before)), after, None if name.startswith("shrink") else cast(Any, kind)
        )
        assert np.abs(np.asarray(result).astype(int) - expected[name]).max() <= 1, (name, kind, before, after)


def shares(before: int, after: int) -> Any:
    """(after, before): the share of each old pixel in each new one, by the length in which they overlap."""
    edges = np.arange(after + 1) * before / after
    overlap = np.minimum(edges[1:, None], np.arange(1, before + 1)) - np.maximum(edges[:-1, None], np.arange(before))
    return overlap.clip(0) * after / before


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_shrinking_by_a_fraction_is_the_exact_average_of_areas_for_images_and_masks(mode: str) -> None:
    stripes = np.tile((np.arange(600) // 3 % 2 * 255).astype(np.uint8), (90, 1))
    image = Image.fromarray(stripes).convert(mode)
    placement = Placement(bucket=(512, 64), resized=(512, 77))
    result = np.asarray(augment.cut(image, placement, placement.centre, flip=False), dtype=float)
    exact = (shares(90, 77) @ stripes @ shares(600, 512).T)[6:70]
    assert np.abs(result - (exact[..., None] if mode == "RGB" else exact)).max() <= 1
    assert len(np.unique(result)) > 20  # not the {0, 128, 255} of an average of whole pixels


def test_a_mask_is_resized_as_its_image_is(tmp_path: Path) -> None:
    grey = np.random.default_rng(4).integers(0, 256, (50, 70), dtype=np.uint8)
    Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "a.png")
    for kind in ("area", "bicubic", "nearest"):
        of = plan(dataset(subset(tmp_path, alpha_mask=True, resize_interpolation=kind), resolution=(32, 32)))
        [item] = of.items
        read = augment.load(item.image, of.subset(item), item.placement, item.placement.centre, stride=1)
        assert torch.allclose(read["mask"][0], (read["pixels"][0] + 1) / 2, atol=1e-6), kind


def test_colours_vary_one_image_in_three_and_slightly() -> None:
    image = Image.new("RGB", (2, 2), (200, 90, 40))
    result = [np.asarray(augment.vary_colours(image, random.Random(seed))) for seed in range(600)]
    changed = [np.abs(a.astype(int) - np.asarray(image)).max() for a in result if not np.array_equal(a, image)]
    assert 140 < len(changed) < 250
    assert max(changed) < 60


def test_a_mask_is_the_mean_over_a_latent_pixel() -> None:
    image = Image.new("L", (16, 8), 0)
    image.paste(255, (0, 0, 4, 8))
    assert augment.mask(image, 8).tolist() == [[[0.5, 0.0]]]
