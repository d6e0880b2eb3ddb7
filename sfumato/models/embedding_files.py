"""Files of learnt words: one tensor (A1111's, kohya's, diffusers'), one for each text encoder (kohya's for Stable
Diffusion XL, ComfyUI's for all others), or kept in an adapter's file (`bundle_emb`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.clients import WORDS as BUNDLE
from sfumato.models.base import Models
from sfumato.models.embeddings import Vectors, encoders_of, readers_of, widths_of

T = TypeVar("T")
KEYS: Mapping[str, tuple[str, ...]] = {
    "clip_l": ("clip_l", "text_encoders_0"),
    "clip_g": ("clip_g", "text_encoders_1"),
    "clip_h": ("clip_h",),
    "t5xxl": ("t5xxl", "t5"),
    "gemma2": ("gemma2_2b",),
    "qwen3": ("qwen3_06b",),
    "qwen25vl": ("qwen25_7b",),
}
"""Text encoder -> what its vectors are called in files, by ComfyUI first; others are diffusers' scripts' and
OneTrainer's."""
ALONE, CLIPS = "emb_params", ("clip_l", "clip_h")
"""kohya's and A1111's name of the vectors of the only text encoder, which is one of these."""
NAMELESS = (ALONE, "*", "")
"""Names of the only tensor that are not the word's."""
STRINGS, IDLE = "string_to_param.", "string_to_token."
"""A1111's: `string_to_param.*` has the vectors; the other tells which token stood for them."""
READER = re.compile(r"(IN|OUT)\d\d|MID")
"""Names of the tensors of extended textual inversion (XTI), as sd-scripts writes it: one for each block of the U-Net
that attends to the text."""


def read(path: Path, models: Models, what: str) -> dict[str, dict[str, Tensor]]:
    """Word -> its vectors (n, d) by encoder, of any such file; (r, n, d) of one of extended textual inversion. A word
    is called as its file, or as a tensor that is called by none of the known names. `what`: the setting, for messages.

    Errors: `UserError` for a file that holds no words, or none for this model.
    """
    tensors, widths, named = files.load(path), widths_of(models), f"{what} {path}"
    if held := {name: t for name, t in tensors.items() if name.startswith(BUNDLE)}:
        files.check_finite(held, named)
        return bundled(held, widths, named)
    files.check_finite(tensors, named)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(IDLE)}
    if not tensors:
        raise UserError(f"{named}: no embedding is in it")
    if all(map(READER.fullmatch, tensors)):
        return {path.stem: _of_readers(tensors, list(readers_of(models)), widths, named)}
    found = by_encoder(tensors, widths, named)
    (name,) = tensors if len(tensors) == 1 else ("",)
    keys = {key for each in KEYS.values() for key in each}
    own = name and name not in {*NAMELESS, *keys} and not name.startswith(STRINGS)
    return {name if own else path.stem: found}


def _of_readers(
    tensors: Mapping[str, Tensor], readers: Sequence[str], widths: Mapping[str, int], named: str
) -> dict[str, Tensor]:
    if tensors.keys() != set(readers) or len({t.shape for t in tensors.values()}) > 1:
        raise UserError(f"{named}: vectors of one shape were expected for each of {', '.join(readers)}")
    each = [by_encoder({ALONE: tensors[name]}, widths, named) for name in readers]
    return {encoder: torch.stack([vectors[encoder] for vectors in each]) for encoder in each[0]}


def bundled(tensors: Mapping[str, Tensor], widths: Mapping[str, int], named: str) -> dict[str, dict[str, Tensor]]:
    """The words beside an adapter -> their vectors by encoder. Errors: as `read`."""
    words: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        word, key = _bundle_name(name)
        if not word:
            raise UserError(f"{named}: {name} names no word")
        words.setdefault(word, {})[key] = tensor
    return {word: by_encoder(each, widths, f"{named}: {BUNDLE}{word}") for word, each in words.items()}


def by_encoder(tensors: Mapping[str, Tensor], widths: Mapping[str, int], named: str) -> dict[str, Tensor]:
    """The tensors of a word -> its vectors by encoder."""
    out = {name: tensors[key] for name, keys in KEYS.items() for key in keys if key in tensors}
    if not out and len(tensors) == 1:
        (tensor,) = tensors.values()
        fits = [name for name, width in widths.items() if width == tensor.shape[-1]] if tensor.ndim else []
        out = {fits[0] if fits else next(iter(widths)): tensor}
    elif len(out) != len(tensors):
        strange = ", ".join(sorted(tensors)[:3])
        raise UserError(f"{named}: no embedding is in it (its tensors: {len(tensors)}, {strange} ...)")
    out = {name: t[None] if t.ndim == 1 else t for name, t in out.items()}
    wrong = [
        f"{named}: vectors {list(t.shape)} for {name}, which "
        + (f"takes vectors of {widths[name]} numbers" if name in widths else "this model does not have")
        for name, t in out.items()
        if t.ndim != 2 or not len(t) or t.shape[1] != widths.get(name)
    ]
    if wrong:
        raise UserError(*wrong)
    return {name: t.float() for name, t in out.items()}


def write(word: str, vectors: Vectors, models: Models, *, by_word: bool = False) -> dict[str, Tensor]:
    """The tensors of a file of one word. `by_word`: of one encoder, as diffusers has it."""
    if len(encoders_of(models)) > 1:
        return {KEYS[name][0]: t for name, t in vectors.items()}
    ((encoder, tensor),) = vectors.items()
    if tensor.ndim == 3:
        return dict(zip(readers_of(models), tensor, strict=True))
    return {word if by_word else ALONE if encoder in CLIPS else KEYS[encoder][0]: tensor}


def bundle(word: str, vectors: Vectors) -> dict[str, Tensor]:
    """The tensors of a word in an adapter's file."""
    return {f"{BUNDLE}{word}.{KEYS[name][0]}": t for name, t in vectors.items()}


def without_words(tensors: Mapping[str, T]) -> dict[str, T]:
    """An adapter file's tensors without those of words."""
    return {name: t for name, t in tensors.items() if not name.startswith(BUNDLE)}


def in_adapter(path: Path, models: Models, what: str) -> dict[str, dict[str, Tensor]]:
    """The words in an adapter's file, as `read`; of most files none."""
    try:
        held = named_in(path)
    except UserError as error:
        raise UserError(*(f"{what} {path}: {m.removeprefix(f'{path}: ')}" for m in error.messages)) from None
    return read(path, models, what) if held else {}


def named_in(path: Path) -> list[str]:
    """The words in an adapter's file, by its header."""
    names = [name for name in files.read_header(path).tensors if name.startswith(BUNDLE)]
    return list(dict.fromkeys(_bundle_name(name)[0] for name in names))


def _bundle_name(name: str) -> tuple[str, str]:
    """A tensor beside an adapter: its word, which may have dots, and what it is called in files of words."""
    name = name.removeprefix(BUNDLE)
    for key in (*(key for keys in KEYS.values() for key in keys), ALONE, f"{STRINGS}*"):
        if name.endswith(f".{key}"):
            return name.removesuffix(f".{key}"), key
    word, _, key = name.partition(".")
    return word, key
