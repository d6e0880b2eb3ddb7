"""What is done to a net so that it fits the card, in the one order in which it works."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sfumato.config import MemoryConfig
from sfumato.errors import UserError
from sfumato.memory.checkpoint import Handle, checkpoint_blocks
from sfumato.memory.compile import Tell, backend_of, check_backend, compile_blocks
from sfumato.memory.offload import Offload


def check_memory_options(blocks: Sequence[nn.Module], config: MemoryConfig) -> None:
    """What the config asks for against a net's blocks, which need no values. Errors: `UserError`."""
    check_backend(config)
    if config.gradient_checkpointing_every > len(blocks):
        raise UserError(
            f"gradient_checkpointing_every {config.gradient_checkpointing_every}: the model has {len(blocks)} blocks, "
            "so that none would be recomputed"
        )


def apply_memory_options(
    blocks: Sequence[nn.Module],
    config: MemoryConfig,
    device: torch.device,
    tell: Tell = print,
    *,
    training: bool = True,
) -> list[Handle]:
    """Apply the config's measures to a net's blocks, once what is trained is attached. Returns what undoes them, the
    last first.

    The order: frozen layers are quantised (while they are read), the trainable is attached, blocks are compiled and
    checkpointed, then their weights are streamed. `device`: where they are used, if not yet there. `tell`: for what the
    user should know.
    """
    handles: list[Handle] = []
    if backend := backend_of(config):
        handles.append(compile_blocks(blocks, backend, tell))
    if training and config.gradient_checkpointing:
        handles.append(
            checkpoint_blocks(
                blocks,
                every=config.gradient_checkpointing_every,
                keep=config.gradient_checkpointing_keep,
                offload=Offload.on(device) if config.cpu_offload_checkpointing else None,
            )
        )
    return handles[::-1]
