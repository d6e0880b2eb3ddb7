"""Lists of ranks and of block numbers, as network_args spell them; imports no torch."""

from __future__ import annotations

import re


def ranks(text: str) -> tuple[int, ...] | None:
    """ "[4,0,4]" or "4,0,4" -> (4, 0, 4); None if it cannot be read."""
    parts = [part.strip() for part in text.strip().strip("[]").split(",")]
    return tuple(map(int, parts)) if all(re.fullmatch(r"\d+", part) for part in parts) else None


def indices(text: str) -> frozenset[int] | None:
    """ "0-2,5" -> {0, 1, 2, 5}; "none" -> {}; None if it cannot be read. "all" is for the caller, who knows how many there are."""
    if text.strip() == "none":
        return frozenset()
    chosen: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            return None
        chosen |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(chosen)
