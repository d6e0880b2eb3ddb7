"""The images that samples follow: which prompt names which, and how they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.data import images
from sfumato.errors import UserError
from sfumato.models.base import Models
from sfumato.sampling.prompts import Prompt


def check_images(prompts: Iterable[Prompt], nets: int, *, needed: bool = True) -> None:
    """That each prompt names an image for each of the control nets that there are; `needed`: or else for none of them;
    and that these can be read. Errors: `UserError`, with all that is wrong."""
    wrong, files = [], dict[Path, None]()
    for prompt in prompts:
        found, where = _files(prompt), f"the prompt {prompt.prompt!r}"
        if found and not nets:
            wrong.append(
                f"{where}: controlnet_image (--cn) is set, but there is no ControlNet to follow it; leave it out"
            )
        elif len(found) != nets and (found or needed):
            wrong.append(f"{where}: {len(found)} images to follow (controlnet_image, --cn) for {nets} ControlNets")
        else:
            wrong += [f"{where}: controlnet_image {path}: no such file" for path in found if not path.is_file()]
            files |= dict.fromkeys(path for path in found if path.is_file())
    for path in files:
        try:
            _opened(path)
        except UserError as error:
            wrong += error.messages
    if wrong:
        raise UserError(*dict.fromkeys(wrong))


@contextmanager
def following(models: Models, prompts: Sequence[Prompt], width: int, height: int) -> Iterator[None]:
    """The model follows the images of prompts that are sampled together, at this size in pixels: all of them, or none.

    Errors: `UserError` for what is no image, and as `check_images`.
    """
    followed = [prompt for prompt in prompts if prompt.controlnet_image is not None]
    check_images(followed, len(models.followers))
    try:
        for place, follower in enumerate(models.followers):
            read = [_read(_files(prompt)[place], width, height) for prompt in followed]
            follower.follow(torch.stack(read) if read else None)
        yield
    finally:
        for follower in models.followers:
            follower.follow(None)


def _files(prompt: Prompt) -> list[Path]:
    """In the order of the control nets."""
    return [Path(name.strip()).expanduser() for name in (prompt.controlnet_image or "").split(";") if name.strip()]


def _opened(path: Path) -> Image.Image:
    """Black where it is transparent, as in training. Errors: `UserError`."""
    try:
        return images.flat(images.read(path, path.suffix), "black")
    except (images.Unreadable, OSError) as error:
        raise UserError(f"controlnet_image {path}: {error}") from error


def _read(path: Path, width: int, height: int) -> Tensor:
    """(3, height, width) in [0, 1]"""
    image = _opened(path)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
