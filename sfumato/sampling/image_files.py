"""Sampled images and latents on disk: their names, what is written in them, and grids of images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sfumato.errors import UserError
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


def save(image: Image.Image, path: Path, prompt: Prompt | None, sampler: str) -> None:
    """Write a PNG that says how it was sampled, in the `parameters` field that other programs read; with no prompt,
    one that says nothing."""
    info = PngInfo()
    if prompt is not None:
        info.add_itxt(
            "parameters",
            f"{prompt.prompt}\nNegative prompt: {prompt.negative_prompt}\nSteps: {prompt.sample_steps}, Sampler: "
            f"{sampler}, "
            f"CFG scale: {prompt.scale}, Seed: {prompt.seed}, Size: {image.width}x{image.height}",
        )
    with files.aside(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_latents(latents: Tensor, path: Path, prompt: Prompt | None) -> None:
    """Write latents (c, h, w), scaled as the denoiser gives them, in sd-scripts' file: `latent` (1, c, h, w), and how
    they were sampled unless there is no prompt."""
    told: dict[str, object] = {}
    if prompt is not None:
        told = {
            "seeds": prompt.seed, "prompt": prompt.prompt, "negative_prompt": prompt.negative_prompt,
            "height": prompt.height, "width": prompt.width, "infer_steps": prompt.sample_steps,
            "guidance_scale": prompt.scale,
        }  # fmt: skip
    files.save(path, {"latent": latents[None].cpu().contiguous()}, {name: str(value) for name, value in told.items()})


def load_latents(path: Path, channels: int) -> Tensor:
    """Latents (c, h, w) of such a file; sd-scripts' may have a dimension of batch or time more. Errors: `UserError` for
    another file, and for latents of more than one image or of other channels."""
    latents = files.load(path).get("latent")
    if latents is None:
        raise UserError(f"{path}: holds no tensor `latent`; a file that --output_type latent wrote was expected")
    shape = tuple(latents.shape)
    sizes = [size for size in shape[:-2] if size != 1] or [1]
    if len(shape) < 3 or sizes != [channels]:
        raise UserError(f"{path}: latents of one image with {channels} channels were expected, not {shape}")
    return latents.reshape(channels, *shape[-2:]).float()


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
