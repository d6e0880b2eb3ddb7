"""Captions of a run that learns a word: sentences in their place, or a look whether the word is in them."""

from __future__ import annotations

import re
from dataclasses import replace

from sfumato.config import Config, SubsetConfig
from sfumato.data.plan import Plan
from sfumato.errors import UserError

_THINGS = (
    "a photo of {a} {w}", "a rendering of {a} {w}", "a cropped photo of the {w}", "the photo of {a} {w}",
    "a photo of a clean {w}", "a photo of a dirty {w}", "a dark photo of the {w}", "a photo of my {w}",
    "a photo of the cool {w}", "a close-up photo of {a} {w}", "a bright photo of the {w}",
    "a cropped photo of {a} {w}", "a photo of the {w}", "a good photo of the {w}", "a photo of one {w}",
    "a close-up photo of the {w}", "a rendition of the {w}", "a photo of the clean {w}", "a rendition of {a} {w}",
    "a photo of a nice {w}", "a good photo of {a} {w}", "a photo of the nice {w}", "a photo of the small {w}",
    "a photo of the weird {w}", "a photo of the large {w}", "a photo of a cool {w}", "a photo of a small {w}",
)  # fmt: skip
_PICTURES = (
    "a painting", "a rendering", "a cropped painting", "the painting", "a clean painting", "a dirty painting",
    "a dark painting", "a picture", "a cool painting", "a close-up painting", "a bright painting",
    "a cropped painting", "a good painting", "a close-up painting", "a rendition", "a nice painting",
    "a small painting", "a weird painting", "a large painting",
)  # fmt: skip
OBJECT = tuple(text.format(a="a", w="{}") for text in _THINGS)
"""Of the paper's code (https://github.com/rinongal/textual_inversion), as sd-scripts has them."""
STYLE = tuple(f"{text} in the style of {{}}" for text in _PICTURES)


def told(plan: Plan, config: Config) -> Plan:
    """The plan with the captions that a word is learnt from. Errors: `UserError` if it is in none of them."""
    e = config.embedding
    if e.token_string is None:
        return plan
    if not (e.use_object_template or e.use_style_template):
        _check(plan, e.token_string)
        return plan
    lines = tuple(text.format(e.token_string) for text in (OBJECT if e.use_object_template else STYLE))
    items, held_out = (
        tuple(i if i.image.is_reg else replace(i, image=replace(i.image, captions=lines)) for i in each)
        for each in (plan.items, plan.held_out)
    )
    datasets = tuple(
        replace(d, subsets=tuple(s if s.is_reg else _one_of_them(s) for s in d.subsets)) for d in plan.datasets
    )
    return replace(plan, items=items, held_out=held_out, datasets=datasets)


def _one_of_them(subset: SubsetConfig) -> SubsetConfig:
    """The options of a folder whose captions are one line by chance, or none as before, and nothing else."""
    return replace(
        subset, enable_wildcard=True, shuffle_caption=False, keep_tokens_separator=None, secondary_separator=None,
        caption_prefix=None, caption_suffix=None, caption_tag_dropout_rate=0.0, token_warmup_step=0,
    )  # fmt: skip


def _check(plan: Plan, word: str) -> None:
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE | re.ASCII)

    def has(text: str | None) -> bool:
        return bool(text and pattern.search(text))

    affixed = any(has(s.caption_prefix) or has(s.caption_suffix) for d in plan.datasets for s in d.subsets)
    if not (affixed or any(has(line) for item in plan.items for line in item.image.captions)):
        raise UserError(
            f"token_string: {word!r} is in no caption, so nothing would be learnt; put it into the captions, into "
            "class_tokens or caption_prefix, or set use_object_template or use_style_template"
        )
