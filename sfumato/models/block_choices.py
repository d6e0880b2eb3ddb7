"""What kohya's network_args choose: ranks of layers, numbers of blocks, pieces of fused layers; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.adapters import AdapterPlan


def ranks(text: str) -> tuple[int, ...] | None:
    """ "[4,0,4]" or "4,0,4" -> (4, 0, 4); None if it cannot be read."""
    parts = [part.strip() for part in text.strip().strip("[]").split(",")]
    return tuple(map(int, parts)) if all(re.fullmatch(r"\d+", part) for part in parts) else None


def indices(text: str) -> frozenset[int] | None:
    """ "0-2,5" -> {0, 1, 2, 5}; "none" -> {}; None if it cannot be read. "all" is for the caller, who knows how many
    there are."""
    if text.strip() == "none":
        return frozenset()
    chosen: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            return None
        chosen |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(chosen)


def rank_of(args: Any, dims: Mapping[str, str], path: str) -> int | None:
    """The rank that `args` give a layer; None: the common one. `dims`: argument -> path pattern of its layers."""
    return next((getattr(args, name) for name, pattern in dims.items() if fnmatchcase(path, pattern)), None)


def is_chosen(args: Any, name: str, i: int, count: int) -> bool:
    """Whether the argument `name`, as `indices` reads it, chooses block `i` of `count`. Errors: `UserError` for blocks
    beyond."""
    text = getattr(args, name)
    if text is None or text.strip() == "all":
        return True
    chosen = indices(text) or frozenset()
    if beyond := sorted(n for n in chosen if n >= count):
        there = f"the model has {count} such blocks, numbered from 0, and none numbered {beyond[0]}"
        raise UserError(f"network_args {name}={text}: {there}")
    return i in chosen


def check_split(plan: AdapterPlan) -> None:
    """Errors: `UserError` if this kind of adapter cannot be one for each piece of a fused layer."""
    from sfumato.adapters.lora import LoRA

    if not issubclass(plan.kind, LoRA):
        raise UserError(f"network_args split_qkv: is for LoRA, not for {plan.kind.__name__}; leave it out")
