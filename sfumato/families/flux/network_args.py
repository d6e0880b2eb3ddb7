"""network_args of kohya's lora_flux: which layers get an adapter, and of which rank; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from sfumato.errors import UserError
from sfumato.models.block_choices import check_split, indices, is_chosen, rank_of, ranks

if TYPE_CHECKING:
    from sfumato.adapters import AdapterPlan
    from sfumato.adapters.insert import TargetLayer

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
"""What stands before the blocks, in the order of in_dims; adapted by in_dims alone."""
INPUT_TARGETS = tuple(f"{name}*" for name in INPUTS)
"""For `Family.targets`."""
BLOCKS = ("double", "single")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkArgs:
    """For `Facts.network_args`. A rank of 0 leaves the layers out; None: they have network_dim."""

    img_attn_dim: int | None = None
    txt_attn_dim: int | None = None
    img_mlp_dim: int | None = None
    txt_mlp_dim: int | None = None
    img_mod_dim: int | None = None
    txt_mod_dim: int | None = None
    single_dim: int | None = None
    single_mod_dim: int | None = None
    in_dims: str | None = None
    """Five ranks, of `INPUTS`: "[4,0,0,0,4]"."""
    train_double_block_indices: str | None = None
    """Numbers of the blocks of two streams that get adapters: "all", "none" or "0-5,8"."""
    train_single_block_indices: str | None = None
    """The same for the blocks of one stream."""
    train_blocks: str | None = None
    """all, double or single."""
    split_qkv: bool = False
    """q, k and v (and the two-layer net in a block of one stream) have adapters of their own, saved as one."""
    train_t5xxl: bool = False
    """Adapters on T5 as well."""

    def __post_init__(self) -> None:
        if wrong := mistakes(self):
            raise UserError(*(f"network_args {message}" for message in wrong))


def mistakes(args: NetworkArgs) -> list[str]:
    """A message for each value that is out of range, cannot be read or would do nothing."""
    given = {name: getattr(args, name) for name in DIMS}
    wrong = [
        f"{name}={value}: expected 0 (none) or more" for name, value in given.items() if value is not None and value < 0
    ]
    if args.in_dims is not None and len(ranks(args.in_dims) or ()) != len(INPUTS):
        wrong.append(
            f"in_dims={args.in_dims}: expected {len(INPUTS)} ranks, those of {', '.join(INPUTS)}, such as [4,0,0,0,4]"
        )
    if args.train_blocks not in (None, "all", *BLOCKS):
        wrong.append(f"train_blocks={args.train_blocks}: expected all, {' or '.join(BLOCKS)}")
    for kind in BLOCKS:
        name = f"train_{kind}_block_indices"
        text = getattr(args, name)
        if text is not None and text.strip() != "all" and indices(text) is None:
            wrong.append(f"{name}={text}: expected all, none or numbers such as 0-5,8")
        elif text is not None and args.train_blocks in BLOCKS and args.train_blocks != kind:
            wrong.append(f"{name}: does nothing with train_blocks={args.train_blocks}; leave one of the two out")
    return wrong


def target_layer(options: Any, plan: AdapterPlan, target: TargetLayer) -> TargetLayer | None:
    """For `Family.target_layer`. `options`: `double_blocks` and `single_blocks`, how many there are, and whether it is
    `guided`.

    Errors: `UserError` for numbers of blocks and for inputs that the model does not have.
    """
    args: NetworkArgs | None = plan.family
    name = target.path.partition(".")[0]
    rank: int | None
    if name in INPUTS:
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
        return target  # a text encoder's
    if rank == 0:
        return None
    layer_options = target.options if rank is None else replace(target.options, rank=rank)
    if args is not None and args.split_qkv and (pieces := _pieces(plan, target)):
        layer_options = replace(layer_options, pieces=pieces)
    return target._replace(options=layer_options)


def _input_rank(options: Any, args: NetworkArgs | None, name: str) -> int:
    inputs = None if args is None or args.in_dims is None else ranks(args.in_dims)
    if args is None or inputs is None:
        return 0
    rank = dict(zip(INPUTS, inputs, strict=True))
    if rank["guidance_in"] and not getattr(options, "guided", True):
        raise UserError(
            f"network_args in_dims={args.in_dims}: the model takes no guidance, so the fourth rank must be 0"
        )
    return rank[name]


def _pieces(plan: AdapterPlan, target: TargetLayer) -> tuple[int, ...]:
    """Output rows of what is fused in a layer; nothing for any other. Errors: as `check_split`."""
    check_split(plan)
    per_sample, out = (int(n) for n in (cast(Any, target.layer).in_features, cast(Any, target.layer).out_features))
    if target.path.endswith(".qkv"):
        return (per_sample,) * 3
    return (per_sample, per_sample, per_sample, out - 3 * per_sample) if target.path.endswith(".linear1") else ()
