"""network_args of kohya's lora_flux: which layers get an adapter, and of which rank; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

from sfumato.config.rules import Must, Natural
from sfumato.errors import UserError
from sfumato.models.block_choices import Arguments, Blocks, check_split, is_chosen, one_for_each, rank_of, ranks

if TYPE_CHECKING:
    from sfumato.adapters import AdapterPlan
    from sfumato.adapters.insert import TargetLayer
    from sfumato.config import FamilyOptions

DIMS: Mapping[str, str] = {
    "img_attn_dim": "double_blocks.*.img_attn.*",
    "txt_attn_dim": "double_blocks.*.txt_attn.*",
    "img_mlp_dim": "double_blocks.*.img_mlp.*",
    "txt_mlp_dim": "double_blocks.*.txt_mlp.*",
    "img_mod_dim": "double_blocks.*.img_mod.*",
    "txt_mod_dim": "double_blocks.*.txt_mod.*",
    "single_dim": "single_blocks.*.linear?",
    "single_mod_dim": "single_blocks.*.modulation.*",
}
"""Argument -> path pattern of the layers whose rank it is."""
INPUTS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
"""What stands before the blocks, in the order of in_dims."""
BLOCKS = ("double", "single")
_KIND = Must(("all", *BLOCKS).__contains__, f"all, {' or '.join(BLOCKS)}")


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
    in_dims: Annotated[str | None, one_for_each(INPUTS)] = None
    """Five ranks, those of img_in, time_in, vector_in, guidance_in and txt_in, which have adapters then:
    "[4,0,0,0,4]"."""
    train_double_block_indices: Blocks = None
    """Numbers of the blocks of two streams that get adapters: "all", "none" or "0-5,8"."""
    train_single_block_indices: Blocks = None
    """The same for the blocks of one stream."""
    train_blocks: Annotated[str | None, _KIND] = None
    """all, double or single."""
    split_qkv: bool = False
    """q, k and v (and the two-layer net in a block of one stream) have adapters of their own, saved as one."""
    train_t5xxl: bool = False
    """Adapters on T5 as well."""

    def sets(self) -> tuple[str, ...]:
        """See `Arguments.sets`."""
        return () if self.in_dims is None else ("inputs",)

    def contradictions(self) -> list[str]:
        """See `Arguments.contradictions`."""
        chosen = {kind: getattr(self, f"train_{kind}_block_indices") for kind in BLOCKS}
        return [
            f"train_{kind}_block_indices: does nothing with train_blocks={self.train_blocks}; leave one of the two out"
            for kind, numbers in chosen.items()
            if numbers is not None and self.train_blocks in BLOCKS and self.train_blocks != kind
        ]


def target_layer(options: FamilyOptions, plan: AdapterPlan, target: TargetLayer) -> TargetLayer | None:
    """For `Family.target_layer`. `options`: `double_blocks` and `single_blocks`, how many there are, and whether it is
    `guided`.

    Errors: `UserError` for numbers of blocks and for inputs that the model does not have.
    """
    args: NetworkArgs | None = plan.family
    name = target.path.partition(".")[0]
    rank: int | None
    if target.ranked:
        rank = None
    elif name in INPUTS:
        rank = _input_rank(options, args, name)
    elif found := re.match(r"(double|single)_blocks\.(\d+)\.", target.path):
        if args is None:
            return target
        kind, i = found[1], int(found[2])
        chosen = args.train_blocks in (None, "all", kind) and is_chosen(
            args, f"train_{kind}_block_indices", i, getattr(options, f"{kind}_blocks")
        )
        rank = rank_of(args, DIMS, target.path) if chosen else 0
    else:
        return target  # a text encoder's, or behind the blocks
    if rank == 0:
        return None
    layer_options = target.options if rank is None else replace(target.options, rank=rank)
    if args is not None and args.split_qkv and (pieces := _pieces(plan, target)):
        layer_options = replace(layer_options, pieces=pieces)
    return target._replace(options=layer_options)


def _input_rank(options: FamilyOptions, args: NetworkArgs | None, name: str) -> int | None:
    inputs = None if args is None or args.in_dims is None else ranks(args.in_dims)
    if args is None or inputs is None:
        return None
    rank = dict(zip(INPUTS, inputs, strict=True))
    if rank["guidance_in"] and not getattr(options, "guided", True):
        raise UserError(
            f"network_args in_dims={args.in_dims}: the model takes no guidance, so the fourth rank must be 0"
        )
    return rank[name]


def _pieces(plan: AdapterPlan, target: TargetLayer) -> tuple[int, ...]:
    """Output rows of what is fused in a layer; nothing for any other. Errors: as `check_split`."""
    check_split(plan)
    width, out = (int(n) for n in (cast(Any, target.layer).in_features, cast(Any, target.layer).out_features))
    if target.path.endswith(".qkv"):
        return (width,) * 3
    return (width, width, width, out - 3 * width) if target.path.endswith(".linear1") else ()
