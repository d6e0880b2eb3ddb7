"""Which blocks of a net are streamed, and what is held where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sfumato.config import MemoryConfig
from sfumato.errors import UserError
from sfumato.tensors.packed import Layout

SLOTS = 2
"""Blocks that are streamed share as many places on the device: one is used while the next one comes."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The blocks that are streamed, by their places in the net."""

    places: tuple[int, ...]
    slots: int = SLOTS

    def device(self, sizes: Sequence[int]) -> int:
        """Bytes that blocks of these `sizes` (`bytes_of`) hold on the device."""
        streamed = [sizes[place] for place in self.places]
        ring = sum(max(streamed[slot :: self.slots], default=0) for slot in range(self.slots))
        return sum(sizes) - sum(streamed) + ring

    def host(self, sizes: Sequence[int]) -> int:
        """Bytes that wait on the host."""
        return sum(sizes[place] for place in self.places)


def choose(count: int, swapped: int) -> Choice:
    """So many of `count` blocks are streamed that the device has to hold `swapped` less; these lie evenly among the
    others, whose computation hides the copies (the formula of musubi-tuner's H2D-only offloader).

    `swapped`: 1 to count - 1. With all but one, there is no room for a block to come while another is used.
    """
    slots = min(SLOTS, count - swapped)
    streamed = swapped + slots
    return Choice(tuple((2 * i + 1) * count // (2 * streamed) for i in range(streamed)), slots)


def of_lists(paths: Sequence[str], swapped: Mapping[str, int]) -> Choice:
    """The same within lists of blocks: `swapped`: name of a list ("double_blocks") -> how many of it. `paths`: the
    blocks' paths in the net."""
    places: list[int] = []
    for name, count in swapped.items():
        own = [i for i, path in enumerate(paths) if path.rpartition(".")[0] == name]
        places += [own[i] for i in choose(len(own), count).places]
    return Choice(tuple(sorted(places)), min(SLOTS, len(paths) - sum(swapped.values())))


LISTS = {"double_blocks_to_swap": "double_blocks", "single_blocks_to_swap": "single_blocks"}
"""Setting -> the list of blocks that it is for."""


def asked(paths: Sequence[str], config: MemoryConfig) -> Choice | None:
    """What the config asks for of a denoiser whose blocks have these paths; None: nothing. Errors: `UserError` for
    numbers that it has not."""
    given = {name: list_name for name, list_name in LISTS.items() if getattr(config, name)}
    counts = {name: sum(path.rpartition(".")[0] == LISTS[name] for path in paths) for name in given}
    if config.blocks_to_swap:
        counts["blocks_to_swap"] = len(paths)
    wrong = [
        f"{name} {getattr(config, name)}: {_room(count, given.get(name, 'blocks'))}"
        for name, count in counts.items()
        if getattr(config, name) >= count
    ]
    if wrong:
        raise UserError(*wrong)
    if given:
        return of_lists(paths, {LISTS[name]: getattr(config, name) for name in given})
    return choose(len(paths), config.blocks_to_swap) if config.blocks_to_swap else None


def asked_of_encoder(count: int, config: MemoryConfig) -> Choice | None:
    """The same of a text encoder with so many blocks."""
    wanted = config.text_encoder_blocks_to_swap
    if wanted and wanted >= count:
        raise UserError(f"text_encoder_blocks_to_swap {wanted}: {_room(count, 'blocks in its largest text encoder')}")
    return choose(count, wanted) if wanted else None


def _room(count: int, called: str) -> str:
    if not count:
        return f"this model has no {called}; leave it out"
    if count < 2:
        return f"this model has one of {called}, which cannot wait on the host; leave it out"
    return f"this model has {count} {called}, and one must be on the device; choose 1 to {count - 1}"


def tensors_of(block: nn.Module, elsewhere: frozenset[int] = frozenset()) -> dict[str, Tensor]:
    """The parameters and buffers of a block, in whatever format, by their names; without those whose ids are
    `elsewhere`."""
    found = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return {name: t for name, t in found.items() if id(t) not in elsewhere}


def bytes_of(blocks: Sequence[nn.Module]) -> list[int]:
    """Of each block, as it is packed."""
    return [Layout.of(tensors_of(block)).nbytes for block in blocks]
