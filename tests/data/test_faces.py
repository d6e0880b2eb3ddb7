"""Cuts around the faces that file names tell."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from folders import dataset, noise, plan, subset, tokenize
from PIL import Image

from sfumato.config.data import ImageOptions
from sfumato.data.batch import Batch
from sfumato.data.buckets import Placement
from sfumato.data.faces import around, face
from sfumato.data.loader import Loader
from sfumato.errors import UserError

BUCKET = Placement((64, 96), (128, 96))


def cuts(low: float, high: float, size: tuple[int, int] = (400, 300), **options: bool) -> list[tuple[float, int, int]]:
    """(scale, place of the face in the cut) of many samples, for a face of 40 pixels at (250, 120)."""
    found = []
    for seed in range(200):
        made, crop = around(
            size, (250, 120, 40), BUCKET, ImageOptions(face_crop_aug_range=(low, high), **options), random.Random(seed)
        )
        assert made.bucket == BUCKET.bucket and all(0 <= c <= trim for c, trim in zip(crop, made.trim, strict=True))
        scale = made.resized[0] / size[0]
        assert made.resized[1] == pytest.approx(size[1] * scale, abs=1)
        found.append((scale, round(250 * scale - crop[0]), round(120 * scale - crop[1])))
    return found


def test_names_tell_faces() -> None:
    assert face(Path("a/b_10_20_30_40.png")) == (10, 20, 40)
    assert face(Path("b_c_10_20_30_5.png")) == (10, 20, 30)
    assert [face(Path(p)) for p in ("b.png", "10_20_30_40.png", "b_1_2_3.png", "b_1_2_0_0.png", "b_1_-2_3_4.png")] == [
        None
    ] * 5


def test_one_number_is_one_cut_as_sd_scripts_works_it_out() -> None:
    """64 / (40 * 2) of the image, and the face in the middle."""
    assert set(cuts(2, 2)) == {(0.8, 32, 48)}


def test_a_range_is_of_sizes_and_moves_the_place_a_little() -> None:
    found = cuts(2, 4)
    scales = [scale for scale, _, _ in found]
    assert 0.4 <= min(scales) < 0.45 and 0.75 < max(scales) <= 0.8025
    assert all(abs(x - 32) <= 3 and abs(y - 48) <= 3 for _, x, y in found) and len(set(found)) > 100


def test_the_image_fills_the_bucket_and_is_not_enlarged_for_the_face() -> None:
    assert {scale for scale, _, _ in cuts(0.1, 0.2)} == {1.0}
    assert {scale for scale, _, _ in cuts(20, 30)} == {96 / 300}
    assert {scale for scale, _, _ in cuts(2, 4, (60, 90))} == {96 / 90}, "too small an image is enlarged to fill it"


def test_random_crop_puts_the_face_anywhere() -> None:
    xs = [x for _, x, _ in cuts(2, 2, random_crop=True)]
    assert min(xs) < 0 and max(xs) > 64, "even out of sight, as in sd-scripts"


def read(root: Path, **options: object) -> list[Batch]:
    made = plan(dataset(subset(root, face_crop_aug_range=(2, 4), num_repeats=8, **options)))
    return [batch for step in Loader(plan=made, seed=0, tokenize=tokenize).epoch(0) for batch in step.batches]


def test_the_loader_cuts_image_and_mask_around_the_face(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 300), "black")
    image.paste((255, 255, 255), (220, 40, 260, 80))
    (tmp_path / "masks").mkdir()
    for path in (tmp_path / "a_240_60_40_40.png", tmp_path / "masks" / "a_240_60_40_40.png"):
        image.save(path)
    batches = read(tmp_path, flip_aug=True, conditioning_data_dir=str(tmp_path / "masks"))
    seen = torch.cat([batch.pixels for batch in batches if batch.pixels is not None])[:, 0] > 0
    masks = torch.cat([batch.mask for batch in batches if batch.mask is not None])[:, 0]
    sides = seen.any(1).sum(1)
    assert len(seen) == 8 and len(set(sides.tolist())) > 3
    assert bool(((sides >= 15) & (sides <= 33)).all()), "64 / 4 to 64 / 2"
    assert bool(seen[:, 32, 32].all()) and bool(((masks > 0.5).sum((1, 2)) >= 4).all())
    shown = torch.nn.functional.avg_pool2d(seen[:, None].float(), 8)[:, 0]
    assert torch.allclose(shown, masks, atol=0.26), "at the same place"
    assert len({tuple(row) for batch in batches for row in batch.sizes[:, 2:4].tolist()}) > 3


def test_names_without_faces_are_told_and_a_folder_without_any_is_refused(tmp_path: Path) -> None:
    noise((64, 64), 1).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="no image's name tells where its face is"):
        read(tmp_path)
    noise((64, 64), 2).save(tmp_path / "a_32_32_20_20.png")
    notes = plan(dataset(subset(tmp_path, face_crop_aug_range=(1, 2)))).notes
    assert [n for n in notes if "1 images have no face in their names" in n and "b.png" in n]
