"""Draw the glyphs of Noto Color Emoji as small pictures with captions: what the model in the box is trained on."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
COLOUR_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
BITMAP_SIZE = 109
"""The one size at which the font holds its bitmaps (136 x 128 px)."""

FORMS = ("{}", "{}, emoji", "{}, colour picture", "a picture of {}")
"""Captions of one picture: training draws one each time, so that further words beside a name do not surprise the
model."""


def captions(path: Path = HERE / "captions.txt") -> list[tuple[str, str]]:
    """(character, caption) of every glyph in the list."""
    rows = (line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return [(chr(int(code, 16)), name) for code, name in rows]


def named(paths: list[Path]) -> list[str]:
    """The names in files where they stand between commas."""
    return [name.strip() for path in paths for name in path.read_text(encoding="utf-8").replace("\n", " ").split(",")]


def draw(font: ImageFont.FreeTypeFont, character: str, em: int, size: int) -> Image.Image:
    """A glyph on white, (size, size) px RGB: `em` px of the font fill the picture but for a margin of 1/24, ink
    centred."""
    room = 2 * em
    ink = Image.new("RGBA", (room, room), (255, 255, 255, 0))
    ImageDraw.Draw(ink).text((em // 2, em // 2), character, font=font, fill="black", embedded_color=True)
    left, top, right, bottom = ink.getchannel("A").getbbox() or (0, 0, room, room)
    if (left, top, right, bottom) == (0, 0, room, room):
        raise SystemExit(f"the font draws nothing for U+{ord(character):04X}")
    side = max(round(em * 12 / 11), right - left, bottom - top)
    sheet = Image.new("RGB", (side, side), "white")
    glyph = ink.crop((left, top, right, bottom))
    sheet.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2), glyph)
    return sheet.resize((size, size), Image.Resampling.LANCZOS)


def write(picture: Image.Image, lines: tuple[str, ...], path: Path) -> None:
    """The picture as PNG, its captions in a .txt beside it, one a line."""
    picture.save(path, optimize=True)
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n")


def contact_sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row after row."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", default=COLOUR_FONT)
    parser.add_argument("--names", type=Path, nargs="+", help="files of names; default: every name in captions.txt")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/pictures"))
    args = parser.parse_args()
    font = ImageFont.truetype(args.font, BITMAP_SIZE)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = set(named(args.names)) if args.names else {caption for _, caption in captions()}
    drawn = []
    for character, caption in captions():
        if caption not in wanted:
            continue
        drawn.append(draw(font, character, 128, args.size))
        write(drawn[-1], tuple(form.format(caption) for form in FORMS), args.out / f"{ord(character):05x}.png")
    contact_sheet(drawn, 32).save(args.out.with_suffix(".png"))
    print(f"{len(drawn)} pictures in {args.out}")


if __name__ == "__main__":
    main()
