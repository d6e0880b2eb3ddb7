"""Which blocks of a model are streamed, as the config asks for it, and the nets put in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sfumato.config import Config
from sfumato.errors import Mistakes, UserError
from sfumato.memory import swap_plan
from sfumato.memory.backends import backend
from sfumato.memory.swap import Swap
from sfumato.models.base import Models
from sfumato.train import dist
from sfumato.train.trainables import caches_text


def chosen(config: Config, models: Models) -> dict[str, swap_plan.Choice]:
    """The nets of which blocks are streamed, and which. Errors: `UserError` for numbers of blocks that a net has not,
    and for a device without memory of its own."""
    wrong, found = Mistakes(), dict[str, swap_plan.Choice | None]()
    paths = {module: path for path, module in models.denoiser.named_modules()}
    with wrong:
        blocks = models.family.blocks(models.denoiser)
        found["denoiser"] = swap_plan.asked([paths[block] for block in blocks], config.memory)
    if config.memory.text_encoder_blocks_to_swap and models.encoders and not caches_text(config):
        numbers = {name: sum(p.numel() for p in net.parameters()) for name, net in models.encoders.items()}
        largest = max(numbers, key=numbers.__getitem__)
        with wrong:
            count = len(models.family.encoder_blocks(models.encoders[largest]))
            found[largest] = swap_plan.asked_of_encoder(count, config.memory)
    wrong.raise_all()
    choices = {name: choice for name, choice in found.items() if choice}
    if choices and dist.device_of().type == "mps":
        raise UserError("blocks_to_swap: this device computes in the CPU's memory, so that none is won; leave it out")
    return choices


def notes(config: Config, models: Models) -> list[str]:
    """For the user: what is streamed. Errors: as `chosen`."""
    device = "the device" if dist.device_of().type != "cpu" else "the device, which is the CPU: that wins nothing"
    return [
        f"{models.source.components[name].component.title}: {len(choice.places)} of {len(blocks)} blocks wait in the "
        f"CPU's memory, and share {choice.slots} places on {device}"
        for name, choice in chosen(config, models).items()
        for blocks in [_blocks(models, name)]
    ]


def _blocks(models: Models, name: str) -> Sequence[nn.Module]:
    """Those of a net that are repeated."""
    family = models.family
    return family.blocks(models.denoiser) if name == "denoiser" else family.encoder_blocks(models.encoders[name])


def place(models: Models, name: str, choice: swap_plan.Choice | None, device: torch.device) -> Swap | None:
    """A net to the device on which it is used, but for blocks that are streamed there."""
    net = models.nets()[name]
    if choice is None:
        net.to(device)
        return None
    blocks = _blocks(models, name)
    sizes = swap_plan.bytes_of(blocks)
    copies, packed = backend(device, choice.host(sizes), max(sizes), dist.outside().size)
    return Swap(net, blocks, choice, copies, packed=packed)
