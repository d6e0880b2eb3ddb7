"""Draw line art for the VAE to learn from: every name's glyph of Noto Emoji, the font in one colour."""

from __future__ import annotations

import argparse
from pathlib import Path

from pictures import captions, contact_sheet, draw, write
from PIL import ImageFont

SCALE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("font", help="NotoEmoji_400Regular.ttf")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/strokes"))
    args = parser.parse_args()
    em = args.size * SCALE
    font = ImageFont.truetype(args.font, round(em * 0.8))
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for number, (character, name) in enumerate(captions()):
        drawn.append(draw(font, character, em, args.size))
        write(drawn[-1], (name,), args.out / f"{number:03d}_{name.replace(' ', '-')}.png")
    contact_sheet(drawn, 32).save(args.out.with_suffix(".png"))
    print(f"{len(drawn)} pictures in {args.out}")


if __name__ == "__main__":
    main()
