"""Samples on which the model is to stay as it is: what it predicts without its adapter is what they teach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from sfumato.config import SubsetConfig
from sfumato.config.data import PRESERVED, CaptionOptions
from sfumato.data.plan import Item, Plan


def with_class(plan: Plan, word: str) -> Plan:
    """The plan with each training image once more, under the caption `word`: a regularisation image that the model
    itself gives the target of (DreamBooth's prior preservation, arXiv:2208.12242, without class images)."""
    datasets = tuple(replace(d, subsets=(*d.subsets, *_copies(d.subsets))) for d in plan.datasets)
    sizes = [len(d.subsets) for d in plan.datasets]
    again = tuple(_again(item, sizes[item.dataset], word) for item in plan.items if not item.image.is_reg)
    return replace(plan, datasets=datasets, items=(*plan.items, *again))


def _copies(subsets: Iterable[SubsetConfig]) -> list[SubsetConfig]:
    plain = {f.name: getattr(SubsetConfig(), f.name) for f in fields(CaptionOptions)}
    return [replace(s, **plain, is_reg=True, custom_attributes={PRESERVED: True}) for s in subsets]


def _again(item: Item, subsets: int, word: str) -> Item:
    return replace(item, image=replace(item.image, captions=(word,), subset=subsets + item.image.subset, is_reg=True))
