"""The caption of a sample, varied from its image's: pure text, and randomness handed in."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import floor, prod
from typing import TypeVar

from sfumato.config.data import CaptionOptions

Options = TypeVar("Options", bound=CaptionOptions)
_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def vary(lines: Sequence[str], options: CaptionOptions, rng: random.Random, *, epoch: int, step: int) -> str:
    """The caption of one sample of an image, in sd-scripts' order: affixes, dropout, wildcards, then tags.

    `lines`: of the caption file. `epoch` counts from 1, `step` (optimizer steps done) from 0;
    `options.token_warmup_step` must be whole steps (`with_whole_warmup`).
    """
    # A random number is taken only when its option is set, so a chance of 0 changes nothing for those that follow.
    if options.caption_dropout_rate > 0 and rng.random() < options.caption_dropout_rate:
        return ""
    if options.caption_dropout_every_n_epochs > 0 and epoch % options.caption_dropout_every_n_epochs == 0:
        return ""
    line = rng.choice(lines) if options.enable_wildcard else lines[0]
    caption = affixed(line, options)
    if options.enable_wildcard:
        caption = _WILDCARD.sub(lambda found: _choice(found, rng), caption)
    return _varied_tags(caption, options, rng, step)


def affixed(line: str, options: CaptionOptions) -> str:
    """A line with caption_prefix and caption_suffix, a space between."""
    return " ".join(part for part in (options.caption_prefix, line, options.caption_suffix) if part)


def _choice(found: re.Match[str], rng: random.Random) -> str:
    return rng.choice(found[1].split("|")) if found[1] else found[0][0]


def _varied_tags(caption: str, options: CaptionOptions, rng: random.Random, step: int) -> str:
    mark = options.keep_tokens_separator
    moves = options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0
    if moves or (mark and mark in caption):
        front, tags, end = _parts(caption, options)
        if step < options.token_warmup_step:
            tags = tags[: _warm(step, len(tags), options)]
        if options.shuffle_caption:
            rng.shuffle(tags)
        if options.caption_tag_dropout_rate > 0:
            tags = [tag for tag in tags if rng.random() >= options.caption_tag_dropout_rate]
        caption = _joint(options.caption_separator).join(front + tags + end)
    if options.secondary_separator:
        caption = caption.replace(options.secondary_separator, options.caption_separator)
    return caption


def _joint(separator: str) -> str:
    """What is put between tags that were split: the separator and a space; a separator of blanks alone stays as it
    is."""
    return f"{separator.rstrip()} " if separator.strip() else separator


def _parts(caption: str, options: CaptionOptions) -> tuple[list[str], list[str], list[str]]:
    """(tags kept in front, tags that may move, tags kept at the end)."""
    mark = options.keep_tokens_separator
    if mark and mark in caption:
        front, _, rest = caption.partition(mark)
        middle, _, end = rest.partition(mark)
        return _split(front, options), _split(middle, options), _split(end, options)
    tags = _split(caption, options)
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def _split(text: str, options: CaptionOptions) -> list[str]:
    return [tag.strip() for tag in text.split(options.caption_separator) if tag.strip()]


def tags(lines: Sequence[str], options: CaptionOptions) -> list[str]:
    """The tags of an image for counts, in lower case as sd-scripts counts them: of lines that may be chosen, split at
    all separators."""
    found: list[str] = []
    for line in lines if options.enable_wildcard else lines[:1]:
        for mark in (options.keep_tokens_separator, options.secondary_separator):
            line = line.replace(mark, options.caption_separator) if mark else line
        found += [tag.lower() for tag in _split(line, options)]
    return found


def _warm(step: int, count: int, options: CaptionOptions) -> int:
    """How many of `count` tags are shown at a step of the warm-up."""
    return floor(step * (count - options.token_warmup_min) / options.token_warmup_step) + options.token_warmup_min


def with_whole_warmup(options: CaptionOptions, steps: int) -> int:
    """`token_warmup_step` in optimizer steps, for a run of `steps`: a value below 1 is a share of the run."""
    warmup = options.token_warmup_step
    return floor(warmup * steps) if warmup < 1 else int(warmup)


def endless(options: CaptionOptions) -> list[str]:
    """The options set that make an image's captions too many to encode beforehand."""
    names = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")
    return [name for name in names if getattr(options, name)]


_UNUSED = random.Random(0)
"""To make one takes longer than all else."""
MOST_CAPTIONS = 256
"""Captions of an image that are encoded beforehand."""


def every(lines: Sequence[str], options: CaptionOptions) -> list[str] | None:
    """All captions that `vary` can give when nothing is `endless`, in a fixed order; None when they are more than
    `MOST_CAPTIONS`."""
    drops = options.caption_dropout_rate > 0 or options.caption_dropout_every_n_epochs > 0
    chosen = list(lines) if options.enable_wildcard else [lines[0]]
    found: list[str] = []
    for line in chosen:
        spelt = _spelt(affixed(line, options)) if options.enable_wildcard else [affixed(line, options)]
        if spelt is None or len(found) + len(spelt) > MOST_CAPTIONS:
            return None
        # No random number is taken: with nothing endless set, the tags do not move.
        found += [_varied_tags(caption, options, _UNUSED, 0) for caption in spelt]
    return list(dict.fromkeys(found + [""] * drops))


def whole(lines: Sequence[str], options: CaptionOptions) -> list[str]:
    """The captions of an image with all of their tags and the longest wildcards. `options`: as `unvaried` gives
    them."""
    texts = [affixed(line, options) for line in (lines if options.enable_wildcard else lines[:1])]
    if options.enable_wildcard:
        texts = [_WILDCARD.sub(_longest, text) for text in texts]
    # No random number is taken: nothing moves.
    return [_varied_tags(text, options, _UNUSED, 0) for text in texts]


def _longest(found: re.Match[str]) -> str:
    return max(found[1].split("|"), key=len) if found[1] else found[0][0]


def unvaried(options: Options) -> Options:
    """The options with nothing dropped or moved."""
    return replace(
        options,
        shuffle_caption=False,
        token_warmup_step=0,
        caption_tag_dropout_rate=0,
        caption_dropout_rate=0,
        caption_dropout_every_n_epochs=0,
    )


def _spelt(caption: str) -> list[str] | None:
    """A caption with its wildcards replaced in all ways, or None when there are more than `MOST_CAPTIONS`."""
    pieces: list[list[str]] = []
    end = 0
    for found in _WILDCARD.finditer(caption):
        pieces += [[caption[end : found.start()]], found[1].split("|") if found[1] else [found[0][0]]]
        end = found.end()
    pieces.append([caption[end:]])
    if prod(map(len, pieces)) > MOST_CAPTIONS:
        return None
    return ["".join(choice) for choice in product(*pieces)]
