"""Which process this is, which device it uses, and what a launcher asked for.

`accelerate launch` and `torchrun` only start processes: what they set is in the environment and is read
here, once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed

from sfumato.errors import UserError

Precision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class Vote:
    """Whether any process wants something, asked step by step. What was said is known one step later, in all processes
    alike, so that none waits for another or for its device."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.value = torch.zeros(())
        self.sent: torch.distributed.Work | None = None

    def said_yes(self, flag: bool, *, last: bool) -> bool:
        """This process's own say; returns whether any process said yes at the step before; alone, whether it does now.
        `last`: nobody asks again."""
        if self.world.size == 1:
            return flag
        if self.sent is not None:
            self.sent.wait()
            self.sent = None
            if self.value.item():
                return True
        if not last:
            self.value = torch.tensor(float(flag))
            self.sent = torch.distributed.all_reduce(self.value, op=torch.distributed.ReduceOp.MAX, async_op=True)
        return False


def outside() -> World:
    """This process's place among those that a launcher started, by the environment alone: nothing is joined and no
    device is taken."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), torch.device("cpu"))


def world() -> World:
    """Join the other processes that a launcher started, if any."""
    rank, size = outside().rank, outside().size
    device = device_of(int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1:
        # What is on the host is exchanged there, so that no device is waited for.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=60))
    return World(rank, size, device)


def device_of(local_rank: int = 0) -> torch.device:
    """The accelerator of this process, or the CPU where there is none or `accelerate launch --cpu` asked for it."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu", local_rank)
    return torch.device("cpu")


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a card for which torch has flash kernels; (0, 0): it has none."""
    has = device.type == "cuda" and not torch.version.hip and torch.backends.cuda.is_flash_attention_available()
    return torch.cuda.get_device_capability(device) if has else (0, 0)


def precision(asked: Precision | None) -> Precision:
    """What the config asks for, else what `accelerate launch --mixed_precision` sets, else "no"."""
    name = asked or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for known in DTYPES:
        if name == known:
            return known
    raise UserError(f"mixed_precision {name!r} (from accelerate launch) is not supported; expected {', '.join(DTYPES)}")


DTYPES: dict[Precision, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The number format of frozen weights, by mixed precision."""
