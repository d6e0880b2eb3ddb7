"""Images that a class of the user's gives, in place of a folder: `dataset_class`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from hashlib import blake2b
from importlib import import_module
from io import BytesIO
from pathlib import PurePath
from typing import Protocol, cast

from PIL import Image

from sfumato.data.images import Unreadable, read, upright
from sfumato.errors import UserError
from sfumato.formats.paths import is_text


class ImageSource(Protocol):
    """What a `dataset_class` must have: three methods. It is made with one argument, `image_dir` (train_data_dir on a
    command line), which may be empty.

    It is asked in several threads at once, and in other processes where these read images.
    """

    def names(self) -> Sequence[str]:
        """The images, in any order that stays: each by a name of its own, by which a resumed run knows it."""
        ...

    def caption(self, name: str) -> str | None:
        """Its caption, of several lines for enable_wildcard; None for class_tokens."""
        ...

    def image(self, name: str) -> Image.Image | bytes:
        """The image, or the bytes of an image file. It may differ each time, but not in size."""
        ...


def make(dataset_class: str, image_dir: str) -> ImageSource:
    """The user's object. `dataset_class`: `module.Class`, found from the current folder too. Errors: `UserError`."""
    module, _, name = dataset_class.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind all others, so that nothing there stands in for a library
    try:
        made = getattr(import_module(module), name)(image_dir)
    except Exception as error:  # it is the user's code
        raise UserError(f"dataset_class {dataset_class}: {_told(error)}") from error
    if missing := [method for method in ("names", "caption", "image") if not callable(getattr(made, method, None))]:
        raise UserError(
            f"dataset_class {dataset_class}: has no {', '.join(missing)}: it needs names() -> list of names, "
            "caption(name) -> text or None, image(name) -> PIL image or bytes"
        )
    return cast(ImageSource, made)


def names(source: ImageSource, dataset_class: str) -> list[str]:
    """The names of its images. Errors: `UserError` for none, and for names that are not texts or not each its own."""
    try:
        found = list(source.names())
    except Exception as error:
        raise UserError(f"dataset_class {dataset_class}: names(): {_told(error)}") from error
    if not found or not all(isinstance(n, str) and is_text(n) and PurePath(n).as_posix() == n != "." for n in found):
        raise UserError(f"dataset_class {dataset_class}: names(): expected texts such as a/b.png, at least one")
    if len(set(found)) < len(found):
        raise UserError(f"dataset_class {dataset_class}: names(): expected each name once")
    return found


def lines(source: ImageSource, name: str) -> tuple[str, ...] | str | None:
    """The lines of a caption that are not blank, an empty one if there is none, None where the class gives none; or a
    string: what is wrong with it."""
    try:
        caption = source.caption(name)
    except Exception as error:
        return f"caption(): {_told(error)}"
    if caption is None:
        return None
    if not isinstance(caption, str):
        return f"caption(): expected text or None, found {type(caption).__name__}"
    if not is_text(caption):
        return f"caption(): expected text, found half of a character: {caption!r:.80}"
    return tuple(line.strip() for line in caption.splitlines() if line.strip()) or ("",)


def image(source: ImageSource, name: str) -> Image.Image:
    """An image in RGB, or RGBA where it has transparency, upright. Errors: `Unreadable`."""
    try:
        given = source.image(name)
    except Exception as error:
        raise Unreadable(f"image(): {_told(error)}") from error
    if isinstance(given, Image.Image):
        return upright(given)
    if isinstance(given, bytes):
        return read(BytesIO(given), PurePath(name).suffix)
    raise Unreadable(f"image(): expected a PIL image or bytes, found {type(given).__name__}")


def digest(image: Image.Image) -> str:
    """Hash of its pixels."""
    return blake2b(repr((image.mode, image.size)).encode() + image.tobytes(), digest_size=20).hexdigest()


def _told(error: Exception) -> str:
    where = f" (looked for in {os.getcwd()} as well)" if isinstance(error, ModuleNotFoundError) else ""
    return f"{type(error).__name__}: {error}{where}"
