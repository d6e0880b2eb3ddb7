"""network_args of kohya's lora_sd3: which layers get an adapter, and of which rank; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

from sfumato.config.rules import Natural
from sfumato.models.block_choices import Arguments, Blocks, check_split, is_chosen, one_for_each, rank_of, ranks

if TYPE_CHECKING:
    from sfumato.adapters import AdapterPlan
    from sfumato.adapters.insert import TargetLayer

DIMS: Mapping[str, str] = {
    "context_attn_dim": "joint_blocks.*.context_block.attn.*",
    "context_mlp_dim": "joint_blocks.*.context_block.mlp.*",
    "context_mod_dim": "joint_blocks.*.context_block.adaLN_modulation.*",
    "x_attn_dim": "joint_blocks.*.x_block.attn*",  # attn2 as well
    "x_mlp_dim": "joint_blocks.*.x_block.mlp.*",
    "x_mod_dim": "joint_blocks.*.x_block.adaLN_modulation.*",
}
"""Argument -> path pattern of the layers whose rank it is."""
EMBEDDERS = (
    "context_embedder",
    "t_embedder",
    "x_embedder",
    "y_embedder",
    "final_layer.adaLN_modulation",
    "final_layer.linear",
)
"""What stands before and after the blocks, in the order of emb_dims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkArgs(Arguments):
    """A rank of 0 leaves the layers out; layers without one of their own have network_dim."""

    context_attn_dim: Natural | None = None
    """Rank on the text's attention."""
    context_mlp_dim: Natural | None = None
    """Rank on its two-layer net."""
    context_mod_dim: Natural | None = None
    """Rank on what its stream is modulated by."""
    x_attn_dim: Natural | None = None
    """Rank on the image's attention."""
    x_mlp_dim: Natural | None = None
    """Rank on its two-layer net."""
    x_mod_dim: Natural | None = None
    """Rank on what its stream is modulated by."""
    emb_dims: Annotated[str | None, one_for_each(EMBEDDERS)] = None
    """Six ranks, those of context_embedder, t_embedder, x_embedder, y_embedder, final_layer.adaLN_modulation and
    final_layer.linear, which have adapters then: "[4,0,0,0,0,4]"."""
    train_block_indices: Blocks = None
    """Numbers of the blocks that get adapters: "all", "none" or "0-5,8"."""
    split_qkv: bool = False
    """q, k and v have adapters of their own, saved as one."""
    train_t5xxl: bool = False
    """Adapters on T5 as well."""

    def sets(self) -> tuple[str, ...]:
        """See `Arguments.sets`."""
        return () if self.emb_dims is None else ("embedders", "output")


def target_layer(blocks: int, plan: AdapterPlan, target: TargetLayer) -> TargetLayer | None:
    """For `Family.target_layer`, of a model with so many blocks.

    Errors: `UserError` for numbers of blocks that the model does not have.
    """
    args: NetworkArgs = plan.family or NetworkArgs()
    rank: int | None
    if target.ranked:
        rank = None
    elif found := re.match(r"joint_blocks\.(\d+)\.", target.path):
        chosen = is_chosen(args, "train_block_indices", int(found[1]), blocks)
        rank = rank_of(args, DIMS, target.path) if chosen else 0
    elif name := next((name for name in EMBEDDERS if f"{target.path}.".startswith(f"{name}.")), None):
        rank = None if args.emb_dims is None else dict(zip(EMBEDDERS, ranks(args.emb_dims) or (), strict=True))[name]
    else:
        return target  # a text encoder's
    if rank == 0:
        return None
    layer_options = target.options if rank is None else replace(target.options, rank=rank)
    return target._replace(
        options=replace(layer_options, pieces=_pieces(plan, target)) if args.split_qkv else layer_options
    )


def _pieces(plan: AdapterPlan, target: TargetLayer) -> tuple[int, ...]:
    """Output rows of q, k and v in a layer that fuses them. Errors: as `check_split`."""
    check_split(plan)
    return (int(cast(Any, target.layer).out_features) // 3,) * 3 if target.path.endswith(".qkv") else ()
