"""What is done to a net so that it fits the card, in the one order in which it works."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sfumato.config import MemoryConfig
from sfumato.memory.checkpoint import checkpoint_blocks


def apply_memory_options(blocks: Sequence[nn.Module], config: MemoryConfig) -> None:
    """Apply the config's measures to a net's blocks, once what is trained is attached.

    The order: frozen layers are quantised, the trainable is attached, blocks are compiled and checkpointed,
    then their weights are swapped. Of these, checkpointing is there so far.
    """
    if config.gradient_checkpointing:
        checkpoint_blocks(blocks)
