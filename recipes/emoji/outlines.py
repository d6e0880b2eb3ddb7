"""Draw the quickstart's line art: the outlines of Noto Color Emoji's glyphs, so that every shape is the one the model
knows."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from pictures import BITMAP_SIZE, COLOUR_FONT, captions, contact_sheet, draw, named, write
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

SIZE = 128
"""Lines are found at about the font's own size; the picture is made smaller afterwards."""
INK = 235
"""A pixel is ink if one of its channels is darker than this, of 255."""
WIDTH = 3
MARGIN = 8


def outline(glyph: Image.Image) -> Image.Image:
    """The rim of the glyph's silhouette: black lines on white."""
    ink = Image.fromarray(((np.asarray(glyph).min(-1) < INK) * 255).astype(np.uint8))
    framed = ImageOps.expand(ink, MARGIN)
    ImageDraw.floodfill(framed, (0, 0), 128)  # the white that is reached from outside
    shape = Image.fromarray(((np.asarray(framed) != 128) * 255).astype(np.uint8)).filter(ImageFilter.MedianFilter(3))
    rim = ImageChops.subtract(
        shape.filter(ImageFilter.MaxFilter(3)), shape.filter(ImageFilter.MinFilter(2 * WIDTH + 1))
    )
    return ImageOps.crop(ImageOps.invert(rim), MARGIN)


def inner_lines(glyph: Image.Image) -> Image.Image:
    """Dark where the glyph is darker than its neighbourhood, white elsewhere."""
    grey = ImageOps.grayscale(glyph)
    ratio = (np.asarray(grey, dtype=float) + 20) / (
        np.asarray(grey.filter(ImageFilter.GaussianBlur(4)), dtype=float) + 20
    )
    return Image.fromarray((((ratio.clip(0, 1) ** 2 - 0.3) / 0.4).clip(0, 1) * 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", default=COLOUR_FONT)
    parser.add_argument(
        "--names", type=Path, nargs="+", default=[Path(__file__).with_name("lineart.txt")], help="files of names"
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("examples/emoji/lineart"))
    parser.add_argument("--sheet", type=Path, help="save all of them side by side as well")
    args = parser.parse_args()
    characters = {caption: character for character, caption in captions()}
    font = ImageFont.truetype(args.font, BITMAP_SIZE)
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for number, name in enumerate(named(args.names)):
        glyph = draw(font, characters[name], SIZE, SIZE)
        lines = ImageChops.darker(outline(glyph), inner_lines(glyph))
        drawn.append(lines.resize((args.size, args.size), Image.Resampling.LANCZOS))
        write(drawn[-1], (name,), args.out / f"{number:03d}_{name.replace(' ', '-')}.png")
    if args.sheet:
        contact_sheet(drawn, 14).save(args.sheet)
    print(f"{len(drawn)} pictures in {args.out}")


if __name__ == "__main__":
    main()
