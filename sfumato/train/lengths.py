"""Captions that are longer than the text encoders take: counted before training, with examples, as what is cut is not
learned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sfumato.data import captions
from sfumato.data.plan import Plan
from sfumato.data.store import Progress
from sfumato.data.strategies import Limit

PORTION = 1000
"""Captions that are counted together."""


def too_long(plan: Plan, limits: Sequence[Limit], progress: Progress | None = None) -> list[str]:
    """One line per text encoder that cuts captions: how many, some of them, and what makes it take more."""
    owners = _owners(plan)
    texts, lines = list(owners), []
    for number, limit in enumerate(limits):
        long: list[tuple[Path, int]] = []
        for start in range(0, len(texts), PORTION):
            portion = texts[start : start + PORTION]
            counted = zip(portion, limit.count(portion), strict=True)
            long += [(path, count) for text, count in counted if count > limit.tokens for path in owners[text]]
            if progress:
                progress(number * len(texts) + start + len(portion), len(limits) * len(texts))
        if long:
            lines.append(_line(limit, long, sum(map(len, owners.values()))))
    return lines


def _owners(plan: Plan) -> dict[str, list[Path]]:
    """Caption -> the images that have it."""
    owners: dict[str, list[Path]] = defaultdict(list)
    options = [[captions.unvaried(subset) for subset in dataset.subsets] for dataset in plan.datasets]
    for item in plan.items:
        for text in captions.whole(item.image.captions, options[item.dataset][item.image.subset]):
            owners[text].append(item.image.path)
    return owners


def _line(limit: Limit, long: Sequence[tuple[Path, int]], total: int) -> str:
    longest = sorted(long, key=lambda each: (-each[1], each[0]))
    examples = ", ".join(f"{path.name} ({count})" for path, count in longest[:5]) + (" ..." if len(long) > 5 else "")
    cure = f"; {limit.raised_by} makes it take more" if limit.raised_by else ""
    return (
        f"{len(long)} of {total} captions have more than the {limit.tokens} tokens that {limit.encoder} reads: "
        f"{examples}{cure}"
    )
