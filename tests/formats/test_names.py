"""The name table engine: one table, read both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.names import (
    CONV_TO_LINEAR,
    SWAP_HALVES,
    TRANSPOSE,
    Change,
    KeyMap,
    Rule,
    add_prefix,
    rule,
)

quick = settings(deadline=None, max_examples=25, derandomize=True)

COMPONENTS = st.sampled_from(["block", "attn", "to_q", "norm", "0", "12", "{i}", "proj"])
LEAVES = st.sampled_from([".weight", ".bias", ".lora_A.weight", ""])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.shape == b[k].shape and torch.equal(t, b[k]) for k, t in a.items())


@st.composite
def tables(draw: st.DrawFn) -> tuple[KeyMap, dict[str, Tensor]]:
    """A random table, and native tensors that it claims."""
    rules, native = [], {}
    for n in range(draw(st.integers(1, 5))):
        path = draw(st.lists(COMPONENTS, min_size=1, max_size=4).filter(lambda p: p.count("{i}") <= 1))
        numbered = "{i}" in path
        pieces = draw(st.integers(1, 3))
        foreign = [
            ".".join(
                [
                    "f",
                    chr(97 + n),
                    chr(97 + p),
                    *(["{i}"] if numbered else []),
                    *draw(st.lists(st.sampled_from(["x", "y", "3"]), max_size=2)),
                ]
            )
            for p in range(pieces)
        ]
        rows = draw(st.none() | st.lists(st.integers(1, 3), min_size=pieces, max_size=pieces).map(tuple))
        change = draw(st.sampled_from([None, None, SWAP_HALVES, TRANSPOSE])) if pieces == 1 else None
        r = Rule(f"n.{chr(97 + n)}." + ".".join(path), tuple(foreign), rows if pieces > 1 else None, change)
        rules.append(r)
        count = sum(rows) if rows and pieces > 1 else 2 * pieces
        for i in draw(st.sets(st.integers(0, 30), min_size=1, max_size=3)) if numbered else [0]:
            for leaf in draw(st.sets(LEAVES, min_size=1)):
                native[r.native.replace("{i}", str(i)) + leaf] = torch.rand(count, 3)
    return KeyMap(*rules), native


@quick
@given(tables())
def test_there_and_back(made: tuple[KeyMap, dict[str, Tensor]]) -> None:
    table, native = made
    foreign = table.to_foreign(native)
    assert sum(t.numel() for t in foreign.values()) == sum(t.numel() for t in native.values())
    assert same(table.to_native(foreign), native)
    assert same(table.to_foreign(table.to_native(dict(reversed(foreign.items())))), foreign)


@quick
@given(tables())
def test_match_says_the_names_of_both_sides(made: tuple[KeyMap, dict[str, Tensor]]) -> None:
    table, native = made
    for name in native:
        match = table.match(name, native=True)
        assert match.native() == name
        assert all(table.match(f, native=False).native() == name for f in match.foreign())


def test_the_most_specific_rule_wins() -> None:
    table = KeyMap(rule("a", "x"), rule("a.b", "y"), rule("a.b.{i}", "z.{i}"))
    names = {"a.weight": "x.weight", "a.b.weight": "y.weight", "a.c.weight": "x.c.weight", "a.b.7.weight": "z.7.weight"}
    assert {k: table.match(k, native=True).foreign()[0] for k in names} == names


def test_a_number_stands_for_numbers_alone() -> None:
    table = KeyMap(rule("a.{i}.b", "x.{i}"))
    with pytest.raises(UserError, match=r"no rule names the tensor 'a\.one\.b'"):
        table.to_foreign({"a.one.b": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "native"),
    [("attn.to_z.weight", True), ("q.wight", False), ("", True), ("attnx.to_q", True), ("other", False)],
)
def test_what_no_rule_claims_is_refused(name: str, native: bool) -> None:
    table = KeyMap(rule("attn.to_q", "q.weights"))
    convert = table.to_foreign if native else table.to_native
    with pytest.raises(UserError, match="no rule names the tensor") as error:
        convert({name: torch.ones(1)})
    assert repr(name) in str(error.value)


def test_the_nearest_name_is_reported() -> None:
    with pytest.raises(UserError, match=r"did you mean 'attn\.to_q\.weight'"):
        KeyMap(rule("attn.to_q.weight", "q")).to_foreign({"attn.to_qq.weight": torch.ones(1)})


def test_pieces_are_joined_in_the_order_of_the_rule() -> None:
    table = KeyMap(rule("qkv", "q", "k", "v", rows=(1, 2, 3)))
    pieces = {"v.weight": torch.full((3, 1), 3.0), "q.weight": torch.ones(1, 1), "k.weight": torch.full((2, 1), 2.0)}
    assert table.to_native(pieces)["qkv.weight"].flatten().tolist() == [1, 2, 2, 3, 3, 3]
    del pieces["k.weight"]
    with pytest.raises(UserError, match=r"without its other pieces: k\.weight"):
        table.to_native(pieces)


def test_pieces_do_not_share_memory_with_the_whole() -> None:
    whole = torch.zeros(4, 2)
    foreign = KeyMap(rule("qk", "q", "k")).to_foreign({"qk": whole})
    foreign["q"] += 1
    assert not whole.any()


def test_changes() -> None:
    t = torch.arange(4.0)
    assert SWAP_HALVES.into(t).tolist() == [2, 3, 0, 1]
    wide = torch.arange(6.0).reshape(2, 3)
    assert TRANSPOSE.into(wide).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert TRANSPOSE.into(wide).is_contiguous()
    conv = torch.rand(4, 3, 1, 1)
    assert CONV_TO_LINEAR.into(conv).shape == (4, 3)
    assert torch.equal(CONV_TO_LINEAR.back(CONV_TO_LINEAR.into(conv)), conv)
    assert CONV_TO_LINEAR.into(t) is t, "a bias has one dimension on both sides"


def test_into_gives_the_native_side_and_back_the_foreign_one() -> None:
    table = KeyMap(rule("a", "x", change=Change(into=lambda t: t + 1, back=lambda t: t - 1)))
    assert table.to_native({"x": torch.zeros(1)})["a"].item() == 1
    assert table.to_foreign({"a": torch.zeros(1)})["x"].item() == -1


def test_a_prefix() -> None:
    assert add_prefix({"a": torch.ones(1)}, "p.").keys() == {"p.a"}
