"""5,000 steps in parts beside 5,000 plain ones: how far the weights are from each other, and whether memory grows.

    python benchmarks/soak.py [--steps 5000] [--out benchmarks/results/soak.json]

A small net learns a function of noise, two batches a step, gradients clipped to a norm that acts. In parts, gradients
and the optimizer's state wait on the host. Drift is the distance of the two results over the way that the plain one
went.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sfumato.config import OptimizerConfig
from sfumato.memory.backends import Threaded
from sfumato.optim import build
from sfumato.optim.fused import FusedStep
from sfumato.optim.groups import Group
from sfumato.optim.trial import steps_alone

CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"clipping": "two_passes"}),
    ("AdamW8bit", {}),
    ("Lion", {}),
    ("AdaFactor", {}),
    ("AdamWScheduleFree", {}),
    ("Prodigy", {}),
    ("AdamW", {"bf16": "stochastic"}),
    ("AdamW", {"bf16": "kahan"}),
]
LIMIT = 1.0


class AtOnce(Threaded):
    """Copies as they are asked for: a thread would take longer than the steps of so small a net."""

    def _queue(self, source: Any, into: Tensor) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(self.copy(source, into))
        return done


def weights() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(0.3 * torch.randn(shape, generator=g)) for shape in ((16, 64), (64,), (64, 16), (16,))]


def backward(own: list[nn.Parameter], step: int, fused: FusedStep | None) -> Tensor:
    g, total = torch.Generator().manual_seed(step), torch.zeros(())
    for number in range(2):
        if fused:
            fused.last = number == 1
        x = torch.randn(32, 16, generator=g).to(own[0].dtype)
        error = (torch.tanh(x @ own[0] + own[1]) @ own[2] + own[3]).float() - (2 * x.float()).sin()
        loss = error.square().mean() / 2
        loss.backward()
        total += loss.detach()
    return total


def optimizer(name: str, own: list[nn.Parameter], bf16: str | None) -> tuple[torch.optim.Optimizer, bool]:
    lr = 1.0 if name == "Prodigy" else 1e-3
    config = OptimizerConfig(optimizer_type=name, learning_rate=lr)
    groups = [Group(name="a", lr=lr, parameters=own)]
    alone = steps_alone(config, groups)
    if bf16:
        for p in own:
            p.data = p.data.bfloat16()
    made = build.optimizer(config, groups)
    if bf16:
        build.in_low_bits(made, 0, kahan=bf16 == "kahan")
    build.training(made)
    return made, alone


def memory() -> tuple[int, int]:
    """Resident bytes, live tensors."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return psutil.Process().memory_info().rss, sum(isinstance(each, Tensor) for each in gc.get_objects())


def soak(name: str, steps: int, bf16: str | None = None, **settings: Any) -> dict[str, Any]:
    plain, apart, off = weights(), weights(), torch.amp.GradScaler("cpu", enabled=False)
    start = torch.cat([p.detach().flatten() for p in plain])
    one, _ = optimizer(name, plain, bf16)
    two, alone = optimizer(name, apart, bf16)
    fused = FusedStep(
        two, [[p] for p in apart], device=torch.device("cpu"), copies=AtOnce(), max_norm=LIMIT,
        together=not alone, state_on_host=alone, **settings,
    )  # fmt: skip
    drift, losses, held, began = [], [], [], time.monotonic()
    for step in range(1, steps + 1):
        loss = backward(plain, step, None)
        nn.utils.clip_grad_norm_(plain, LIMIT)
        one.step()
        one.zero_grad()
        other, _ = fused.step(partial(backward, apart, step, fused), off, lambda: None)
        if step % (steps // 5) == 0:
            a, b = (torch.cat([p.detach().float().flatten() for p in each]) for each in (plain, apart))
            drift.append(float((a - b).norm() / (a - start).norm()))
            losses.append((float(loss), float(other)))
            held.append(memory())
    return {
        "optimizer": name, "bf16": bf16, **settings, "drift": drift, "losses": losses,
        "tensors": [n for _, n in held], "grown_kib": (held[-1][0] - held[0][0]) // 1024,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = []
    for name, settings in CASES:
        found.append(soak(name, given.steps, **settings))
        print(json.dumps(found[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
