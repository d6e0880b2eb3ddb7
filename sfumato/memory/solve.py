"""Which settings make a training fit a card in the least time: arithmetic on what was traced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

RATE = 1e14
"""Operations a second of a card, assumed: a good desktop card of 2024 in bf16. Only its ratio to `COPY` counts."""
COPY = 2e10
"""Bytes a second from page-locked memory to the card, assumed: PCIe 4.0 x16."""
Format = Literal["fp8", "int8", "nf4", "auto"]
CODES: Mapping[Format, float] = {"fp8": 1.06, "int8": 1.06, "nf4": 1.12, "auto": 1.1}
"""Time of a step on weights in codes, against plain ones: they are made wide in both passes. Assumed."""
PART = 1.03
"""The same for each halving of a batch. Assumed."""
BESIDE = 1.02
"""The same where copies go on beside the computation. Assumed."""
CONTEXT = 2**30
"""Bytes that a card's driver and libraries take, and what kernels need while they run."""
LOST = 0.04
"""Share of the rest that lies idle between tensors."""


def usable(vram: int) -> int:
    """What tensors may take of a card's memory, in bytes."""
    return int((vram - CONTEXT) * (1 - LOST))


@dataclass(frozen=True, slots=True)
class Levers:
    """What can be done so that a training needs less of a card."""

    quantize: Format | None = None
    every: int | None = None
    """Every n-th block is recomputed; None: none."""
    offloaded: bool = False
    """What recomputed blocks were given waits on the host."""
    swapped: int = 0
    """Blocks for which the card needs no room."""
    micro: int = 1
    """Images that pass at once."""

    def settings(self, batch: int) -> dict[str, Any]:
        """The same as settings of `MemoryConfig`; `batch`: images of a whole one."""
        return {
            "quantize": self.quantize,
            "gradient_checkpointing": self.every is not None,
            "gradient_checkpointing_every": self.every or 1,
            "cpu_offload_checkpointing": self.offloaded,
            "blocks_to_swap": self.swapped or None,
            "micro_batch": self.micro if self.micro < batch else None,
        }

    def __str__(self) -> str:
        said = [f"quantize {self.quantize}"] if self.quantize else []
        if self.every:
            said.append("gradient_checkpointing" + (f" every {self.every} blocks" if self.every > 1 else ""))
        said += ["cpu_offload_checkpointing"] if self.offloaded else []
        said += [f"blocks_to_swap {self.swapped}"] if self.swapped else []
        return ", ".join([*said, f"{self.micro} image{'s' if self.micro > 1 else ''} at once"])


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to train, and what it takes."""

    levers: Levers
    device: int
    """Bytes of the card, at most."""
    host: int
    """Bytes of the host's memory for what waits there."""
    seconds: float
    """Of a step, on the card that is assumed: to compare with others."""
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    """Phase -> what -> bytes, where the phase needs the most."""


def seconds(levers: Levers, *, flops: int, again: int, copied: int, batch: int) -> float:
    """Time of a step. `flops`: of both passes over the whole batch; `again`: of what is computed again; `copied`: bytes
    that go to the card, or back, in a pass over a part of the batch."""
    parts = math.ceil(batch / levers.micro)
    compute = (flops + again) / RATE * (CODES[levers.quantize] if levers.quantize else 1.0) * PART ** math.log2(parts)
    return float(max(compute * (BESIDE if copied else 1.0), parts * copied / COPY))


def choose(candidates: Iterable[Candidate], budget: int, host: int) -> Candidate | None:
    """The fastest of those that fit card and host; of equals the one that needs least. None: none fits."""
    fit = (c for c in candidates if c.device <= budget and c.host <= host)
    return min(fit, key=lambda c: (c.seconds, c.device), default=None)


def halves(batch: int) -> Sequence[int]:
    """The sizes that a batch is cut into: whole, half, a quarter ... one image."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes
