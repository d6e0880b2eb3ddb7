"""Sampled images on disk: their names, what is written in them, and grids of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sfumato.formats import files
from sfumato.sampling.prompts import Prompt

MARGIN = 8


def file_name(
    name: str, index: int, *, epoch: int | None = None, step: int | None = None, seed: int | None = None
) -> str:
    """`{name}_{e000001|000100}_{index:02d}_{timestamp}{_seed}.png`, as sd-scripts names its samples."""
    when = f"e{epoch:06d}" if epoch is not None else f"{step:06d}" if step is not None else ""
    parts = [name, when, f"{index:02d}", time.strftime("%Y%m%d%H%M%S"), "" if seed is None else str(seed)]
    return "_".join(p for p in parts if p) + ".png"


def save(image: Image.Image, path: Path, prompt: Prompt, sampler: str) -> None:
    """Write a PNG that says how it was sampled, in the `parameters` field that other programs read."""
    info = PngInfo()
    info.add_itxt(
        "parameters",
        f"{prompt.prompt}\nNegative prompt: {prompt.negative_prompt}\nSteps: {prompt.sample_steps}, Sampler: "
        f"{sampler}, "
        f"CFG scale: {prompt.scale}, Seed: {prompt.seed}, Size: {image.width}x{image.height}",
    )
    with files.aside(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def grid(
    rows: Sequence[Sequence[Image.Image]],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    *,
    enlarge: int = 1,
) -> Image.Image:
    """Images in rows on white, each in a cell of the largest one's size; `enlarge` repeats pixels of small images.

    Titles, if given, are one per row or one per column, and are wrapped to fit.
    """
    font = ImageFont.load_default(14)
    width = max(p.width for row in rows for p in row) * enlarge
    height = max(p.height for row in rows for p in row) * enlarge
    left = max(72, width) if row_titles else 0
    heads = [_wrapped(title, font, width) for title in column_titles]
    top = max((_text_height(text, font) for text in heads), default=-MARGIN) + MARGIN
    columns = max(len(row) for row in rows)
    out = Image.new(
        "RGB", (left + columns * (width + MARGIN) + MARGIN, top + len(rows) * (height + MARGIN) + MARGIN), "white"
    )
    draw = ImageDraw.Draw(out)
    for x, text in enumerate(heads):
        draw.multiline_text((left + MARGIN + x * (width + MARGIN), MARGIN), text, "black", font)
    for y, row in enumerate(rows):
        corner = top + MARGIN + y * (height + MARGIN)
        if y < len(row_titles):
            draw.multiline_text((MARGIN, corner), _wrapped(row_titles[y], font, left - MARGIN), "black", font)
        for x, image in enumerate(row):
            large = image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
            out.paste(large, (left + MARGIN + x * (width + MARGIN), corner))
    return out


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrapped(text: str, font: _Font, width: int) -> str:
    """Text broken into lines of at most `width` pixels, where words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _text_height(text: str, font: _Font) -> int:
    return int(ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)[3])
