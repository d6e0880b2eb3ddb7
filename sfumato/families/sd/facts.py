"""Stable Diffusion 1.x and 2.x: options and how files are recognised; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run can be told about Stable Diffusion 1.x and 2.x."""

    v2: bool | None = None
    """The base model is Stable Diffusion 2.x; default: seen from the file."""
    v_parameterization: bool = False
    """The model predicts v instead of noise (Stable Diffusion 2.x at 768 px)."""
    clip_skip: int | None = None
    """Use the text encoder's n-th layer from the end; default 1 (the last)."""
    max_token_length: Literal[75, 150, 225] = 75
    """Tokens of a caption; longer ones are cut. 150 and 225 are encoded in chunks of 75."""
    weighted_captions: bool = False
    """Read `(word:1.3)` and `[word]` in captions as weights."""
