"""Names, metadata and grids of drawn images."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from sfumato.sampling.image_files import file_name, grid, save
from sfumato.sampling.prompts import Prompt


def test_names_are_sd_scripts() -> None:
    assert re.fullmatch(r"cat_e000003_01_\d{14}_7\.png", file_name("cat", 1, epoch=3, seed=7))
    assert re.fullmatch(r"cat_000100_12_\d{14}\.png", file_name("cat", 12, step=100))
    assert re.fullmatch(r"cat_00_\d{14}_0\.png", file_name("cat", 0, seed=0))


def test_a_image_says_how_it_was_sampled(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    save(
        Image.new("RGB", (8, 16), "red"),
        path,
        Prompt(prompt="ein Kätzchen 🐱", negative_prompt="dull", seed=5),
        "euler",
    )
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
        text = image.info["parameters"]
    assert (
        text == "ein Kätzchen 🐱\nNegative prompt: dull\nSteps: 30, Sampler: euler, CFG scale: 7.5, Seed: 5, Size: 8x16"
    )
    assert list(path.parent.iterdir()) == [path]


def test_a_grid_keeps_every_pixel_and_its_place() -> None:
    red, green, blue = (Image.new("RGB", (w, 32), c) for w, c in ((32, "red"), (16, "lime"), (32, "blue")))
    out = grid([[red, green], [blue]], enlarge=2)
    counts = {colour: n for n, colour in out.getcolors() or []}
    assert counts[255, 0, 0] == 64 * 64 and counts[0, 255, 0] == 32 * 64 and counts[0, 0, 255] == 64 * 64
    assert (
        out.getpixel((8, 8)) == (255, 0, 0)
        and out.getpixel((8 + 72, 8)) == (0, 255, 0)
        and out.getpixel((8, 8 + 72)) == (0, 0, 255)
    )


def test_titles_stand_beside_the_images() -> None:
    red = Image.new("RGB", (64, 64), "red")
    plain = grid([[red, red]])
    titled = grid([[red, red]], ["before the training of it"], ["a cat with a hat", "a dog"])
    assert titled.width > plain.width and titled.height > plain.height
    assert {colour: n for n, colour in titled.getcolors(9999) or []}[255, 0, 0] == 2 * 64 * 64
    dark = titled.convert("L").point(lambda v: 255 * (v < 50)).getbbox()
    assert dark is not None and dark[0] < 64 and dark[1] < 32
