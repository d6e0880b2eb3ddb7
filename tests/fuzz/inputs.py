"""What is done to good inputs: JSON trees of other shapes, bytes turned, cut and put in, words of a language in wrong places."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

DEEP = 3000
_DEEP_MARK, _TWIN_MARK = "@deep@", "@twin@"
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 0.5, -0.0, 1e308, 2**31, 2**63, 10**30, float("nan"), float("inf")),
    *("", "x", "f32", "I32", "F32", "F4", "\ud800", "a\0b", "../x", "x" * 5000, "ä"),
    *([], [[]], [None], [-1, 1], [0], [1.5], [2**40, 2**40], {}, {"": None}, {"x": []}, _DEEP_MARK),
)
"""Values that no reader expects everywhere."""
WORDS = (
    *(
        "[",
        "]",
        "{",
        "}",
        "=",
        '"',
        "'",
        "'''",
        ",",
        ".",
        "#",
        "\\",
        "\n",
        "\r",
        "\t",
        "\0",
        "\ufeff",
        "-",
        "--",
        " ",
        ":",
        "\u2028",
    ),
    *(
        "[[",
        "]]",
        "[" * DEEP,
        "{" * DEEP,
        "a." * DEEP,
        "9" * 5000,
        "1e999",
        "nan",
        "-1",
        "true",
        "null",
        "0x",
        "\x1b",
        "é",
        "(",
        "a=b",
    ),
)
"""Pieces of the languages that people write files in."""


def tree(valid: Any) -> SearchStrategy[bytes]:
    """JSON texts of a tree of which some branches are odd, gone, doubled, or wrapped."""
    places = _places(valid)
    change = st.tuples(
        st.sampled_from(places),
        st.sampled_from(("odd", "odd", "gone", "wrapped", "twin", "swapped")),
        st.sampled_from(ODD),
    )
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _text(_changed(valid, changes)))


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [at, *(place for key, each in inner for place in _places(each, (*at, key)))]


def _changed(valid: Any, changes: Sequence[tuple[tuple[Any, ...], str, Any]]) -> Any:
    holder = {"": copy.deepcopy(valid)}
    for place, how, odd in changes:
        at: Any = holder
        *way, last = ("", *place)
        try:
            for key in way:
                at = at[key]
            old = at[last]
            match how:
                case "odd":
                    at[last] = copy.deepcopy(odd)
                case "gone":
                    del at[last]
                case "wrapped":
                    at[last] = [old, odd] if isinstance(odd, list) else {"x": old}
                case "twin":
                    at[f"{_TWIN_MARK}{last}"] = old
                case "swapped":
                    at[last], at[next(iter(at))] = at[next(iter(at))], old
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
    return holder.get("")


def _text(value: Any) -> bytes:
    text = json.dumps(value).replace(_TWIN_MARK, "").replace(json.dumps(_DEEP_MARK), "[" * DEEP + "]" * DEEP)
    return text.encode()


def turned(*valid: bytes, most: int = 4) -> SearchStrategy[bytes]:
    """Bytes of which some are others, cut off somewhere, or with some put in."""
    change = st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(("turn", "turn", "cut", "put", "zeros", "drop")),
        st.binary(max_size=4),
    )
    return st.tuples(st.sampled_from(valid), st.lists(change, min_size=1, max_size=most)).map(
        lambda drawn: _turned(*drawn)
    )


def _turned(data: bytes, changes: Sequence[tuple[float, str, bytes]]) -> bytes:
    out = bytearray(data)
    for share, how, given in changes:
        at = int(share * len(out))
        match how:
            case "turn":
                out[at : at + len(given)] = given
            case "cut":
                del out[at:]
            case "put":
                out[at:at] = given * 20
            case "zeros":
                out[at : at + 64] = bytes(min(64, len(out) - at))
            case "drop":
                del out[at : at + 16]
    return bytes(out)


def written(*valid: str) -> SearchStrategy[str]:
    """Texts in which some words are put in, or stretches are gone."""
    change = st.tuples(
        st.floats(0, 1, exclude_max=True), st.sampled_from(("put", "put", "drop", "instead")), st.sampled_from(WORDS)
    )
    return st.tuples(st.sampled_from(valid), st.lists(change, min_size=1, max_size=4)).map(
        lambda drawn: _written(*drawn)
    )


def _written(text: str, changes: Sequence[tuple[float, str, str]]) -> str:
    for share, how, word in changes:
        at = int(share * len(text))
        end = at + {"put": 0, "drop": 9, "instead": 3}[how]
        text = text[:at] + ("" if how == "drop" else word) + text[end:]
    return text
