"""Items made ahead: the same ones, no more than asked for, errors in their turn, and no thread is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from sfumato.data.ahead import read_ahead


def test_no_more_is_made_than_asked_for_and_all_in_order() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    for i in read_ahead(items(), 2):
        assert len(made) <= i + 3
    assert made == list(range(20)) and i == 19


def test_an_error_comes_in_its_turn_and_the_thread_goes() -> None:
    def items() -> Iterator[str]:
        yield from "ab"
        raise ValueError("c is gone")

    before, taken = threading.active_count(), []
    with pytest.raises(ValueError, match="c is gone"):
        for item in read_ahead(items(), 3):
            taken.append(item)
    assert taken == ["a", "b"] and threading.active_count() == before


def test_what_is_closed_early_makes_no_more() -> None:
    before, made = threading.active_count(), []
    ahead = read_ahead(map(made.append, range(100)), 2)  # type: ignore[func-returns-value]
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    assert len(made) <= 3 and threading.active_count() == before
