"""network_args of kohya's lora for Stable Diffusion XL: those of other U-Nets, with another count of blocks; imports no
torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sfumato.families.sd import network_args
from sfumato.families.sd.network_args import BlockNumbers

UNET_BLOCKS: BlockNumbers = {
    "time_embed": (0, 1),
    "label_emb": (0, 1),
    "input_blocks": (1, 9),
    "middle_block": (10, 3),
    "output_blocks": (13, 9),
    "out": (22, 1),
}
"""sd-scripts' count of the 23 blocks, for block_lr as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkArgs(network_args.NetworkArgs):
    """For `Facts.network_args`."""

    BLOCKS: ClassVar[BlockNumbers] = UNET_BLOCKS
