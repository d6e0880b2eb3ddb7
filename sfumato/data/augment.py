"""From an image to the pixels that a net gets: resize, crop, mirror, colours, and the mask along with them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sfumato.config.data import ImageOptions, Interpolation
from sfumato.data.batch import Size
from sfumato.data.buckets import Crop, Placement
from sfumato.data.images import flat
from sfumato.data.scan import ImageFile, open_image

_PILLOW: Mapping[Interpolation, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
}
_OPENCV: Mapping[Interpolation, str] = {
    "area": "INTER_AREA",
    "bilinear": "INTER_LINEAR",
    "linear": "INTER_LINEAR",
    "bicubic": "INTER_CUBIC",
    "cubic": "INTER_CUBIC",
}
"""Which library resizes how: as in sd-scripts. Pillow has no average of areas that is exact when a side shrinks by a
fraction."""


def resize(image: Image.Image, size: Size, interpolation: Interpolation | None = None) -> Image.Image:
    """To (width, height); by default area averages when neither side grows, else lanczos."""
    if image.size == size:
        return image
    shrinks = size[0] <= image.width and size[1] <= image.height
    kind = interpolation or ("area" if shrinks else "lanczos")
    if kind in _PILLOW:
        return image.resize(size, _PILLOW[kind])
    cv2 = _opencv()
    return Image.fromarray(cv2.resize(np.asarray(image), size, interpolation=getattr(cv2, _OPENCV[kind])))


@cache
def _opencv() -> Any:
    """OpenCV without threads of its own: images are read in parallel already, and its threads do not survive a fork."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def cut(
    image: Image.Image, placement: Placement, crop: Crop, *, flip: bool, interpolation: Interpolation | None = None
) -> Image.Image:
    """The part of an image (or of its mask) that belongs to the bucket; `crop` is in the image that is not mirrored."""
    part = resize(image, placement.resized, interpolation).crop(placement.box(crop))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part


def pixels(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) in [-1, 1], fp32."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))  # (H, W, 3)
    return (values / 127.5 - 1).permute(2, 0, 1).contiguous()


def mask(image: Image.Image, stride: int) -> Tensor:
    """Grey image of the bucket -> (1, h, w) in [0, 1] at latent size: the mean over each latent pixel's `stride` x
    `stride` pixels."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))[None] / 255  # (1, H, W)
    return functional.avg_pool2d(values, stride)


def random_crop(placement: Placement, rng: random.Random) -> Crop:
    """Any cut of the bucket out of the resized image, all as likely."""
    return rng.randint(0, placement.trim[0]), rng.randint(0, placement.trim[1])


def vary_colours(image: Image.Image, rng: random.Random) -> Image.Image:
    """One image in three with another hue (up to 16 degrees) or gamma (0.95 to 1.05): sd-scripts' `color_aug`."""
    if rng.random() >= 1 / 3:
        return image
    if rng.random() < 0.5:
        hue, saturation, value = image.convert("HSV").split()
        turn = round(rng.uniform(-16, 16) / 360 * 256)
        return Image.merge("HSV", (hue.point([(h + turn) % 256 for h in range(256)]), saturation, value)).convert("RGB")
    gamma = rng.uniform(0.95, 1.05)
    return image.point([round(255 * (v / 255) ** gamma) for v in range(256)] * 3)


def control(file: ImageFile, options: ImageOptions, placement: Placement, crop: Crop, *, flip: bool) -> Tensor:
    """The image that another is to follow, cut and mirrored as that is: (3, H, W) in [0, 1], fp32; black where it is
    transparent. Raises UserError naming the file."""
    assert file.control_path is not None
    image = flat(open_image(file.control_path, file.control_digest), "black")
    part = cut(image, placement, crop, flip=flip, interpolation=options.resize_interpolation)
    values = torch.from_numpy(np.array(part, dtype=np.float32))  # (H, W, 3)
    return (values / 255).permute(2, 0, 1).contiguous()


def load(
    file: ImageFile,
    options: ImageOptions,
    placement: Placement,
    crop: Crop,
    *,
    stride: int,
    flip: bool = False,
    colours: random.Random | None = None,
) -> dict[str, Tensor]:
    """Read an image as a net gets it: "pixels" (3, H, W) in [-1, 1], and "mask" (1, h, w) in [0, 1] where its folder
    has masks.

    `colours`: vary them by these random numbers. Raises UserError naming the file.
    """
    image = file.open()
    covering = None
    if options.alpha_mask:
        # Alpha is a weight here, not transparency: what lies under it is the image.
        covering = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)
        image = image.convert("RGB")
    elif file.mask_path:
        covering = flat(open_image(file.mask_path, file.mask_digest), "black").getchannel("R")
    part = cut(flat(image), placement, crop, flip=flip, interpolation=options.resize_interpolation)
    read = {"pixels": pixels(vary_colours(part, colours) if colours else part)}
    if covering is not None:
        read["mask"] = mask(
            cut(covering, placement, crop, flip=flip, interpolation=options.resize_interpolation), stride
        )
    return read
