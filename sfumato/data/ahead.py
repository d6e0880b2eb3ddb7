"""Runs what makes items in a thread of its own, a few items ahead of whoever takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_END = object()


def read_ahead(items: Iterator[_T], count: int) -> Iterator[_T]:
    """The same items in the same order. While one is in use, up to `count` more are made.

    An error is raised when its item's turn comes. When the iterator is closed, no more are made, and the thread is
    gone.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="sfumato reads ahead") as pool:
        coming = deque(pool.submit(next, items, _END) for _ in range(count))
        try:
            while (item := coming.popleft().result()) is not _END:
                coming.append(pool.submit(next, items, _END))
                yield item  # type: ignore[misc]
        finally:
            for each in coming:
                each.cancel()
