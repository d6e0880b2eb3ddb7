"""An image file of any kind to upright RGB or RGBA of 8 bits."""

from __future__ import annotations

import struct
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin, features

_FORMATS: tuple[str, ...] = (
    *("PNG", "JPEG", "BMP", "DIB", "GIF"),
    *(
        plugin.format
        for plugin in (TiffImagePlugin.TiffImageFile, WebPImagePlugin.WebPImageFile, AvifImagePlugin.AvifImageFile)
    ),
)
"""What Pillow may open, whatever the ending says: it would start other programs for some other formats (Ghostscript for
EPS)."""


class _PlugIn(NamedTuple):
    """What makes Pillow read a format."""

    title: str
    format: str
    """As Pillow calls it."""
    module: str
    package: str


_HEIF = _PlugIn("HEIC", "HEIF", "pillow_heif", "pillow-heif")
_PLUG_INS = {
    ".jxl": _PlugIn("JPEG XL", "JXL", "pillow_jxl", "pillow-jxl-plugin"),
    ".heic": _HEIF,
    ".heif": _HEIF,
    **({} if features.check("avif") else {".avif": _PlugIn("AVIF", "AVIF", "pillow_avif", "pillow-avif-plugin")}),
}
"""Ending of a name -> what must be installed for it; Pillow itself reads AVIF as it usually comes."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright (EXIF 2.3, tag 0x0112)."""


class Unreadable(Exception):
    """An image cannot be read; the message gives the reason."""


def read(source: Path | IO[bytes], suffix: str) -> Image.Image:
    """A whole image, upright, in RGB, or in RGBA where it has transparency; the first frame of an animation.

    `suffix`: of the file's name, for the message. Raises Unreadable, OSError.
    """
    with _open(source, suffix) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """An image that Pillow has opened, whole, as `read` gives it. Raises Unreadable."""
    try:
        image.load()
        plain = _eight_bits(image)
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        # Pillow's decoders raise all of these on damaged data.
        raise Unreadable(f"damaged: {error}") from error
    if 0 in plain.size:
        raise Unreadable(f"has no pixels: it is {plain.width}x{plain.height}")
    turn = _UPRIGHT.get(_orientation(image))
    return plain.transpose(turn) if turn is not None else plain


def flat(image: Image.Image, colour: str = "white") -> Image.Image:
    """RGB: what is transparent shows `colour`."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(ground, image).convert("RGB")


def _open(source: Path | IO[bytes], suffix: str) -> Image.Image:
    formats: tuple[str, ...] = _FORMATS
    if plug_in := _PLUG_INS.get(suffix.lower()):
        _register(plug_in)
        formats = (*_FORMATS, plug_in.format)
    try:
        return Image.open(source, formats=formats)
    except UnidentifiedImageError as error:
        raise Unreadable(_unidentified(source, suffix)) from error
    except Image.DecompressionBombError as error:
        raise Unreadable(f"too large: {error}") from error
    except (ValueError, SyntaxError, EOFError, struct.error) as error:
        raise Unreadable(f"damaged: {error}") from error


def _register(plug_in: _PlugIn) -> None:
    """Have Pillow know a format. Raises Unreadable where its plug-in is not installed."""
    try:
        _registered(plug_in.module)
    except ImportError as error:
        raise Unreadable(f"{plug_in.title} needs a plug-in: pip install {plug_in.package}") from error


@cache
def _registered(module: str) -> None:
    made = import_module(module)  # most register themselves with Pillow
    if register := getattr(made, "register_heif_opener", None):
        register()


def _unidentified(source: Path | IO[bytes], suffix: str) -> str:
    start = _start(source)
    if not start:
        return "the file is empty"
    if kind := _seems(start):
        return f"{kind}, whatever its name says: give it its own ending, or save it as PNG or JPEG"
    return f"not an image that this Pillow reads (is it really {suffix.lower()}, and whole?)"


def _start(source: Path | IO[bytes]) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(32)
    source.seek(0)
    return source.read(32)


def _seems(start: bytes) -> str:
    """What an unsupported file is, by its first bytes, or nothing."""
    if start.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "a PostScript file (EPS)"
    if start.startswith(b"%PDF"):
        return "a PDF file"
    if start.startswith(b"8BPS"):
        return "a Photoshop file"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "a HEIC image"
    if start.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return "a JPEG XL image"
    if start.lstrip().lower().startswith((b"<svg", b"<?xml", b"<!doctype", b"<html")):
        return "text in SVG, XML or HTML"
    return ""


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, of a decoded image: a PNG may have its EXIF data behind its pixels."""
    if image.format in ("TIFF", "JXL", "HEIF"):
        return 1  # these are upright when they are decoded
    # An image with broken EXIF data is still an image; other readers show it as it lies.
    with suppress(Exception):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Greys of 16 bits (in 32 bits in some formats): Pillow's own conversion would clip them at 255.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("images of floating-point numbers have no fixed white: save it with 8 or 16 bits a channel")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
