"""What kohya's network_args choose: ranks of layers, numbers of blocks, pieces of fused layers; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

from sfumato.config import rules
from sfumato.config.rules import Must
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


Blocks = Annotated[
    str | None,
    Must(lambda text: text.strip() == "all" or indices(text) is not None, "all, none or numbers such as 0-5,8"),
]
"""Numbers of blocks, as `indices` reads them."""


def one_for_each(names: Sequence[str]) -> Must:
    """The rule of a text of ranks, one for each of these layers."""
    example = ",".join("4" if i in (0, len(names) - 1) else "0" for i in range(len(names)))
    return Must(
        lambda text: len(ranks(text) or ()) == len(names),
        f"{len(names)} ranks, those of {', '.join(names)}, such as [{example}]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """A base of the network_args of a family, for `Facts.network_args`."""

    def __post_init__(self) -> None:
        wrong = [f"{name}={getattr(self, name)}: {message}" for name, message in rules.mistakes(self)]
        if wrong := wrong + self.contradictions():
            raise UserError(*(f"network_args {message}" for message in wrong))

    def contradictions(self) -> list[str]:
        """A message for each argument that contradicts another, or would do nothing."""
        return []

    def sets(self) -> tuple[str, ...]:
        """Sets of the denoiser's layers that get adapters besides, by these arguments."""
        return ()

    def rate_factor(self, path: str) -> float:
        """Factor on the rate of a layer of the denoiser; 0: it is not trained."""
        return 1.0


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
