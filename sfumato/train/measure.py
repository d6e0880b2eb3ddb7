"""What a run takes of the card's memory, beside what was predicted; and a card that is made smaller, to try it."""

from __future__ import annotations

import torch

from sfumato.config import Config
from sfumato.config.sizes import size
from sfumato.errors import UserError
from sfumato.memory.tracker import Tracker
from sfumato.models.base import Models
from sfumato.train.devices import peak_memory
from sfumato.train.loop import Run
from sfumato.train.predict import used
from sfumato.train.trainables import Trainable

MIB = 2**20


def limit(config: Config) -> int | None:
    """Bytes of the card that `simulate_vram` asks for."""
    return size(config.memory.simulate_vram) if config.memory.simulate_vram else None


def cap(config: Config, device: torch.device) -> None:
    """Have the accelerator's allocator give no more than `simulate_vram`; a CPU is capped by `tracker`. Errors:
    `UserError` for an accelerator that is smaller, or whose allocator takes no limit."""
    wanted = limit(config)
    if wanted is None or device.type == "cpu":
        return
    module = getattr(torch, device.type)
    if not hasattr(module, "set_per_process_memory_fraction") or not hasattr(module, "mem_get_info"):
        raise UserError(f"simulate_vram: torch cannot limit the memory of {device.type}; leave it out")
    there = module.mem_get_info(device)[1]
    if wanted > there:
        raise UserError(
            f"simulate_vram {config.memory.simulate_vram}: the card has {there / 2**30:.1f} GB; choose less"
        )
    module.set_per_process_memory_fraction(wanted / there, device)


def tracker(config: Config, models: Models, trainable: Trainable, device: torch.device) -> Tracker | None:
    """On a CPU with `simulate_vram`: what counts tensors, from the weights that are there on, and has no more memory to
    give than was asked for."""
    wanted = limit(config)
    if wanted is None or device.type != "cpu":
        return None
    nets = [models.vae if name == "vae" else models.nets()[name] for name in used(config, models)]
    made = Tracker(wanted)
    made.know(t for net in (*nets, trainable.modules()) for t in (*net.parameters(), *net.buffers()))
    return made


def peak(run: Run) -> int:
    """The most bytes: of tensors where they were counted, of an accelerator, else of this process."""
    return run.tracker.peak if run.tracker else peak_memory(run.world.device)


def comparable(run: Run) -> bool:
    """Whether `peak` is of what was predicted: not of a whole process."""
    return run.predicted is not None and (run.tracker is not None or run.world.device.type != "cpu")


def told(run: Run) -> str:
    """The peak, and what was predicted."""
    measured = peak(run)
    said = f"peak memory {measured / MIB:.0f} MiB"
    if run.predicted is None or not comparable(run):
        return said
    return f"{said}, {run.predicted / MIB:.0f} MiB predicted ({run.predicted / measured - 1:+.1%})"


def log(run: Run) -> None:
    """The same in the log."""
    if run.log and comparable(run) and run.predicted is not None:
        run.log.write(run.step, **{"memory/peak_mib": peak(run) / MIB, "memory/predicted_mib": run.predicted / MIB})
