"""network_args of kohya's lora_lumina: which layers get an adapter, and of which rank; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from sfumato.config.rules import Must, Natural
from sfumato.models.block_choices import Arguments, one_for_each, rank_of, ranks

if TYPE_CHECKING:
    from sfumato.adapters import AdapterPlan
    from sfumato.adapters.insert import TargetLayer

DIMS: Mapping[str, str] = {
    "attn_dim": "*.attention.*",
    "mlp_dim": "*.feed_forward.*",
    "mod_dim": "*.adaLN_modulation.*",
}
"""Argument -> path pattern of the layers whose rank it is."""
REFINERS = ("noise_refiner", "context_refiner")
EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")
"""What stands before the blocks, in the order of embedder_dims."""
CHOICES: Mapping[str, tuple[str, ...]] = {
    "all": ("layers", *REFINERS, "final_layer"),
    "transformer": ("layers",),
    "refiners": REFINERS,
    "noise_refiner": ("noise_refiner",),
    "context_refiner": ("context_refiner",),
}
"""Value of train_blocks -> how the paths of what it chooses begin."""
_OF_GEMMA = re.compile(r"layers\.\d+\.(self_attn|mlp)\.")
"""Paths of the text encoder, whose blocks are called as the denoiser's."""
_CHOICE = Must(lambda text: text in CHOICES, f"one of {', '.join(CHOICES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkArgs(Arguments):
    """A rank of 0 leaves the layers out; layers without one of their own have network_dim."""

    attn_dim: Natural | None = None
    """Rank on the attention of all blocks."""
    mlp_dim: Natural | None = None
    """Rank on their gated nets."""
    mod_dim: Natural | None = None
    """Rank on what they are modulated by."""
    refiner_dim: Natural | None = None
    """Rank on all layers of the blocks that text and image pass alone, in place of the other ranks."""
    embedder_dims: Annotated[str | None, one_for_each(EMBEDDERS)] = None
    """Three ranks, those of x_embedder, t_embedder and cap_embedder, which have adapters then: "[4,0,4]"."""
    train_blocks: Annotated[str | None, _CHOICE] = None
    """all, transformer (the common blocks), refiners, noise_refiner or context_refiner."""

    def sets(self) -> tuple[str, ...]:
        """See `Arguments.sets`."""
        return () if self.embedder_dims is None else ("embedders",)


def target_layer(plan: AdapterPlan, target: TargetLayer) -> TargetLayer | None:
    """For `Family.target_layer`."""
    args: NetworkArgs = plan.family or NetworkArgs()
    if target.ranked or _OF_GEMMA.match(target.path):
        return target
    rank = _rank(args, target.path, target.path.partition(".")[0])
    if rank is None:
        return target
    return target._replace(options=replace(target.options, rank=rank)) if rank else None


def _rank(args: NetworkArgs, path: str, start: str) -> int | None:
    """The rank of a layer of the denoiser; None: the common one. `start`: the first part of its path."""
    if start in EMBEDDERS:
        given = None if args.embedder_dims is None else ranks(args.embedder_dims)
        return None if given is None else given[EMBEDDERS.index(start)]
    if start not in CHOICES[args.train_blocks or "all"]:
        return 0
    if start in REFINERS and args.refiner_dim is not None:
        return args.refiner_dim
    return rank_of(args, DIMS, path)
