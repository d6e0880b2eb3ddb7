"""Amounts of memory as people write them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[GM])(i?B)?", re.IGNORECASE)


def size(text: str) -> int | None:
    """ "12GB", "12 GiB" or "12288MB" -> bytes; None for anything else.

    A GB is 2^30 bytes, as makers of cards count: one that is sold as 12 GB has so many.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or not float(found["number"]):
        return None
    return int(float(found["number"]) * 2 ** (30 if found["unit"] in "gG" else 20))
