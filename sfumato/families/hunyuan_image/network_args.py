"""network_args of kohya's lora_hunyuan_image: which layers get an adapter, and of which rank; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sfumato.config.rules import Natural
from sfumato.models.block_choices import Arguments, Blocks, is_chosen, rank_of

if TYPE_CHECKING:
    from sfumato.adapters import AdapterPlan
    from sfumato.adapters.insert import TargetLayer
    from sfumato.config import FamilyOptions

DIMS: Mapping[str, str] = {
    "img_attn_dim": "double_blocks.*.img_attn_*",
    "txt_attn_dim": "double_blocks.*.txt_attn_*",
    "img_mlp_dim": "double_blocks.*.img_mlp.*",
    "txt_mlp_dim": "double_blocks.*.txt_mlp.*",
    "img_mod_dim": "double_blocks.*.img_mod.*",
    "txt_mod_dim": "double_blocks.*.txt_mod.*",
    "single_dim": "single_blocks.*.linear?",
    "single_mod_dim": "single_blocks.*.modulation.*",
}
"""Argument -> path pattern of the layers whose rank it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkArgs(Arguments):
    """A rank of 0 leaves the layers out; layers without one of their own have network_dim."""

    img_attn_dim: Natural | None = None
    """Rank on the image's attention in blocks of two streams."""
    txt_attn_dim: Natural | None = None
    """The same for the text's."""
    img_mlp_dim: Natural | None = None
    """Rank on the image's two-layer net."""
    txt_mlp_dim: Natural | None = None
    """The same for the text's."""
    img_mod_dim: Natural | None = None
    """Rank on what the image's stream is modulated by."""
    txt_mod_dim: Natural | None = None
    """The same for the text's."""
    single_dim: Natural | None = None
    """Rank on the two layers of blocks of one stream."""
    single_mod_dim: Natural | None = None
    """Rank on what blocks of one stream are modulated by."""
    train_double_block_indices: Blocks = None
    """Numbers of the blocks of two streams that get adapters: "all", "none" or "0-5,8"."""
    train_single_block_indices: Blocks = None
    """The same for the blocks of one stream."""


def target_layer(options: FamilyOptions, plan: AdapterPlan, target: TargetLayer) -> TargetLayer | None:
    """For `Family.target_layer`. `options`: `double_blocks` and `single_blocks`, how many there are.

    Errors: `UserError` for numbers of blocks that the model does not have.
    """
    args: NetworkArgs | None = plan.family
    found = re.match(r"(double|single)_blocks\.(\d+)\.", target.path)
    if args is None or target.ranked or found is None:
        return target
    kind, i = found[1], int(found[2])
    chosen = is_chosen(args, f"train_{kind}_block_indices", i, getattr(options, f"{kind}_blocks"))
    rank = rank_of(args, DIMS, target.path) if chosen else 0
    if rank == 0:
        return None
    return target if rank is None else target._replace(options=replace(target.options, rank=rank))
