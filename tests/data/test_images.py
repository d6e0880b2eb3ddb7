"""Every kind of image file, and every way of lying on its side."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from folders import noise
from PIL import Image, ImageOps, PngImagePlugin, features

from sfumato.data import images
from sfumato.data.images import flat, read
from sfumato.data.scan import open_image
from sfumato.errors import UserError

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_modes_keep_what_is_visible(tmp_path: Path) -> None:
    rgb = noise((20, 12), 1)
    files = {
        "rgb.png": rgb,
        "rgb.bmp": rgb,
        "rgb.tif": rgb,
        "rgb.webp": rgb,
        "cmyk.tif": rgb.convert("CMYK"),
        "palette.png": rgb.quantize(256),
        "grey.png": rgb.convert("L"),
        "one.png": rgb.convert("1"),
    }
    for name, image in files.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        opened = open_image(tmp_path / name)
        assert opened.mode == "RGB", name
        assert np.array_equal(opened, image.convert("RGB")), name


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_of_grey_are_not_clipped(tmp_path: Path, kind: str) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / f"a.{kind}")
    assert np.array_equal(np.asarray(open_image(tmp_path / f"a.{kind}"))[..., 1], GREY)


def test_floating_point_is_refused_with_advice(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*8 or 16 bits"):
        open_image(tmp_path / "a.tif")


def test_transparency_shows_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    grey = Image.merge("LA", (Image.new("L", (4, 4), 7), Image.new("L", (4, 4), 0)))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    marked = Image.new("RGB", (4, 4), (1, 2, 3))
    for name, image, options in [
        ("rgba", clear, {}),
        ("la", grey, {}),
        ("p", palette, {"transparency": 0}),
        ("trns", marked, {"transparency": (1, 2, 3)}),
        ("l", Image.new("L", (4, 4), 9), {"transparency": 9}),
    ]:
        image.save(tmp_path / f"{name}.png", **options)
        opened = open_image(tmp_path / f"{name}.png")
        assert opened.mode == "RGBA", name
        assert flat(opened).getpixel((3, 3)) == (255, 255, 255), name
    assert flat(open_image(tmp_path / "rgba.png")).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise((24, 16), 2).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as raw:
        upright = ImageOps.exif_transpose(raw).convert("RGB")  # Pillow's own, as an oracle
    opened = open_image(tmp_path / name)
    assert np.array_equal(opened, upright)
    assert opened.size == ((16, 24) if orientation >= 5 else (24, 16))


def late_exif() -> bytes:
    """A PNG that has its eXIf chunk behind its pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, chunk = BytesIO(), BytesIO()
    noise((24, 16), 3).save(plain, "png")
    PngImagePlugin.putchunk(chunk, b"eXIf", exif.tobytes()[6:])
    end = plain.getvalue().rindex(b"IEND") - 4
    return plain.getvalue()[:end] + chunk.getvalue() + plain.getvalue()[end:]


def test_exif_behind_the_pixels_counts_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(late_exif())
    with Image.open(tmp_path / "a.png") as raw:
        assert ImageOps.exif_transpose(raw).size == (16, 24)
    assert open_image(tmp_path / "a.png").size == (16, 24)


def test_broken_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    noise((24, 16), 4).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff")
    assert open_image(tmp_path / "a.jpg").size == (24, 16)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "empty"), (b"hello", "not an image"), (b"\x89PNG\r\n\x1a\n", "not an image|damaged")]
)
def test_what_is_no_image_is_reported(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.png: .*({reason})"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize(
    ("data", "seems"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\nshowpage\n%%EOF\n", "PostScript"),
        (b"8BPS" + bytes(60), "Photoshop"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(60), "HEIC"),
        (b"P6\n2 2\n255\n" + bytes(12), "not an image"),  # Pillow could read it
    ],
)
def test_only_the_formats_that_are_meant_are_opened(
    tmp_path: Path, name: str, data: bytes, seems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("another program is started")

    monkeypatch.setattr(subprocess, "Popen", started)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=seems):
        open_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "MPO"])
def test_every_format_that_is_meant_is_opened_whatever_its_ending(tmp_path: Path, kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    more = {"save_all": True, "append_images": [noise((24, 16), 7)]} if kind == "MPO" else {}
    noise((24, 16), 6).save(tmp_path / "a.png", format=kind, **more)
    assert open_image(tmp_path / "a.png").size == (24, 16)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "a.gif"])
def test_a_truncated_image_is_reported(tmp_path: Path, name: str) -> None:
    noise((64, 64), 5).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=name):
        open_image(tmp_path / name)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read(tmp_path / "a.gif", ".gif").convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("a.JXL", "pillow_jxl", "pillow-jxl-plugin"), ("a.heic", "pillow_heif", "pillow-heif")],
)
def test_a_plug_in_that_is_missing_is_named(
    tmp_path: Path, name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images._registered.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(60))
    with pytest.raises(UserError, match=f"needs a plug-in: pip install {package}"):
        open_image(tmp_path / name)


@pytest.mark.parametrize(("name", "module"), [("a.jxl", "pillow_jxl"), ("a.heic", "pillow_heif")])
def test_formats_of_plug_ins_are_read_upright(tmp_path: Path, name: str, module: str) -> None:
    pytest.importorskip(module)
    images._registered.cache_clear()
    images._register(images._PLUG_INS[Path(name).suffix])
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = noise((6, 4), 3).resize((48, 32), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / name, exif=exif.tobytes())
    # HEIC has a turn of its own, made when it is decoded; in JPEG XL what EXIF says does not count.
    expected = np.asarray(smooth.transpose(Image.Transpose.ROTATE_270) if name == "a.heic" else smooth, float)
    opened = np.asarray(open_image(tmp_path / name), float)
    assert opened.shape == expected.shape and np.abs(opened - expected).mean() < 8
    clear = smooth.copy()
    clear.putalpha(128)
    clear.save(tmp_path / name)
    assert open_image(tmp_path / name).mode == "RGBA"
