"""The four strategies of Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.batch import Cond, Tokens
from sfumato.data.strategies import (
    KohyaLatents,
    LatentsCachingStrategy,
    Limit,
    TextEncoderOutputsCachingStrategy,
)
from sfumato.models.encoders.tokenizers import fingerprint, limit

CHUNK = 75
"""Tokens that the text encoder takes at once, without the marks of start and end."""

LONGEST = 3 * CHUNK
"""The most that `max_token_length` can be."""

LATENTS = LatentsCachingStrategy(kohya=KohyaLatents(suffixes=("_sd.npz", "_sdxl.npz"), plain=True))
"""Some of sd-scripts' trainers write SDXL's ending."""
OUTPUTS = TextEncoderOutputsCachingStrategy(fields=("hidden",))


@dataclass(frozen=True)
class SdTokenize:
    """Captions -> {"ids": (b, chunks, 77)}, and {"weights": (b, chunks, 77)} for weighted captions; without padding (b,
    1, n)."""

    tokenizer: Any
    max_length: int = CHUNK
    """Tokens of a caption, a multiple of 75; further ones are cut."""
    weighted: bool = False
    padded: bool = True
    """Or as long as the longest caption given, which is no longer than one chunk."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the tokens depend on besides the caption."""
        return {
            "max_token_length": self.max_length,
            "weighted_captions": self.weighted,
            "vocabulary": fingerprint(self.tokenizer),
            "pad": self.tokenizer.pad_token_id,
        }

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """See the class."""
        rows = [self._row(caption) for caption in captions]
        tokens = {"ids": torch.tensor([chunks(ids, self.max_length, *self._marks()) for ids, _ in rows])}
        if self.weighted:
            tokens["weights"] = torch.tensor([chunks(w, self.max_length, 1.0, 1.0, 1.0) for _, w in rows])
        longest = CHUNK if self.padded else min(CHUNK, max(len(ids) for ids, _ in rows))
        return {name: each[..., : longest + 2] for name, each in tokens.items()}

    def limits(self) -> list[Limit]:
        """The chunks together."""
        raised_by = "max_token_length" if self.max_length < LONGEST else ""
        if not self.weighted:
            return limit("CLIP", self.tokenizer, self.max_length, raised_by)

        def count(captions: Sequence[str]) -> list[int]:
            return [len(self._row(caption)[0]) for caption in captions]

        return [Limit(encoder="CLIP", tokens=self.max_length, count=count, raised_by=raised_by)]

    def _marks(self) -> tuple[int, int, int]:
        t = self.tokenizer
        return t.bos_token_id, t.eos_token_id, t.pad_token_id

    def _row(self, caption: str) -> tuple[list[int], list[float]]:
        """The caption's token ids and weights, uncut and without marks."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in emphasis(caption) if self.weighted else [(caption, 1.0)]:
            # verbose: transformers warns of captions over 77 tokens, which are cut or chunked here.
            part = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            ids += part
            weights += [weight] * len(part)
        return ids, weights


def chunks(row: Sequence[Any], length: int, bos: Any, eos: Any, pad: Any) -> list[list[Any]]:
    """A caption's tokens -> rows of 77: start, 75 tokens, end; what the caption leaves empty is padded.

    The end mark stands where the caption ends, and closes every row that text fills to the last place; a row
    after the end of the text is an empty caption of its own.
    """
    row = list(row[:length])
    rows = []
    for start in range(0, length, CHUNK):
        part = row[start : start + CHUNK]
        rows.append([bos, *part, eos, *[pad] * (CHUNK - len(part))])
    return rows


@dataclass(frozen=True)
class SdEncode:
    """Tokens -> {"hidden": (b, 75 * chunks + 2, d)}."""

    encoder: str
    """Name of the text encoder."""
    clip_skip: int = 1
    """The layer whose states are used, from the end; the final norm follows."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the states depend on besides tokens and encoder."""
        return {"clip_skip": self.clip_skip}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class. Each chunk is encoded by itself."""
        net = encoders[self.encoder]
        device = next(net.parameters()).device
        ids = tokens["ids"].to(device)
        states = net(ids.flatten(0, 1), self.clip_skip).normed.unflatten(0, ids.shape[:2])  # (b, chunks, 77, d)
        if "weights" in tokens:
            # The mean is not restored afterwards, as in sd-scripts' training.
            states = states * tokens["weights"].to(device, states.dtype)[..., None]
        return {"hidden": join(states)}


def join(states: Tensor) -> Tensor:
    """(b, chunks, 77, d) -> (b, 75 * chunks + 2, d): the first start, all that stands between the marks, the last
    end."""
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], 1)


# --- weighted captions ---

_MARK = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)
RAISED = 1.1
"""Weight of `(text)`; `[text]` has its inverse."""


def emphasis(caption: str) -> list[tuple[str, float]]:
    """Caption -> pieces of text with their weights.

    `(a)` weighs a by 1.1, `[a]` by 1 / 1.1, `(a:1.3)` by 1.3; they nest by multiplying; a backslash before a
    bracket makes it plain text; a bracket that is never closed holds to the end.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []
    for match in _MARK.finditer(caption):
        mark, number = match[0], match[1]
        if mark in ("(", "["):
            opened.append((mark, len(pieces)))
        elif number and _closes(opened, "("):
            _weigh(pieces, opened.pop()[1], float(number))
        elif mark in (")", "]") and _closes(opened, "(" if mark == ")" else "["):
            _weigh(pieces, opened.pop()[1], RAISED if mark == ")" else 1 / RAISED)
        else:
            pieces.append((mark[1:] if mark[0] == "\\" and len(mark) > 1 else mark, 1.0))
    for mark, start in opened:
        _weigh(pieces, start, RAISED if mark == "(" else 1 / RAISED)
    return _merged(pieces)


def _closes(opened: Sequence[tuple[str, int]], mark: str) -> bool:
    return bool(opened) and opened[-1][0] == mark


def _weigh(pieces: list[tuple[str, float]], start: int, factor: float) -> None:
    pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]


def _merged(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of the same weight as one piece, so that no word is cut in two."""
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]
