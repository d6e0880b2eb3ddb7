"""Draw the line art of the quickstart: glyphs of Noto Emoji, the font in one colour, with captions in one style."""

from __future__ import annotations

import argparse
from pathlib import Path

from pictures import captions, contact_sheet, draw, named, write
from PIL import ImageFont

SCALE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("font", help="NotoEmoji_400Regular.ttf")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("examples/emoji/lineart"))
    parser.add_argument("--names", type=Path, nargs="+", default=[Path(__file__).with_name("lineart.txt")], help="files of names")
    parser.add_argument("--all", action="store_true", help="every name in captions.txt: line art for the VAE to learn from")
    args = parser.parse_args()
    characters = {caption: character for character, caption in captions()}
    em = args.size * SCALE
    font = ImageFont.truetype(args.font, round(em * 0.8))
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for number, name in enumerate(characters if args.all else named(args.names)):
        drawn.append(draw(font, characters[name], em, args.size))
        write(drawn[-1], (name,), args.out / f"{number:03d}_{name.replace(' ', '-')}.png")
    sheet = Path("runs/emoji") / f"{args.out.name}.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(drawn, 10).save(sheet)
    print(f"{len(drawn)} pictures in {args.out}")


if __name__ == "__main__":
    main()
