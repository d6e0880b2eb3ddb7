"""Predicted peaks of memory against counted ones: nets of real widths with fewer blocks, whose steps are done on the
CPU with every tensor counted; and what is predicted of the whole net on a card.

    python benchmarks/predict.py                     # the table of docs/memory.md
    python benchmarks/predict.py --families sdxl --resolution 256
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sfumato import adapters, families
from sfumato.config import Config, DataConfig, MemoryConfig, NetworkConfig, OptimizerConfig, TrainConfig
from sfumato.data.batch import Batch
from sfumato.memory.tracker import Tracker
from sfumato.models.base import Models
from sfumato.train import bench, outlines
from sfumato.train.devices import choose_formats
from sfumato.train.predict import Predicted, predict_of

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": ("network", {}),
    "LoRA, checkpointing": ("network", {"gradient_checkpointing": True}),
    "LoRA, int8, every 2nd block": (
        "network",
        {"quantize": "int8", "gradient_checkpointing": True, "gradient_checkpointing_every": 2},
    ),
    "whole model, checkpointing, SGD": ("full", {"gradient_checkpointing": True}),
}
FAMILIES = ("sd3", "flux", "lumina2", "anima")
GIB = 2**30


def config(family: str, method: str, memory: dict[str, Any]) -> Config:
    return Config(
        data=DataConfig(cache_latents=True, cache_text_encoder_outputs=True),
        train=TrainConfig(mixed_precision="bf16"),
        optimizer=OptimizerConfig(optimizer_type="SGD" if method == "full" else "AdamW"),
        memory=MemoryConfig(**memory),
        network=NetworkConfig(network_dim=16, network_alpha=16.0),
        family=families.facts(family).options(),
    )


def predicted(case: bench.Case, folder: Path, *, card: bool) -> int:
    """Bytes of a step with these shapes, from them alone."""
    models = outlines.outline_of(families.family(case.family), case.config.family, case.parts, folder)
    choose_formats(case.config, models, case.method)
    for name, net in models.made().items():
        models.source.components[name].quantise(net)
    plan = adapters.parse(case.config.network, families.facts(case.family).network_args)

    def batch(of: Models) -> Batch:
        with unset_fake_temporarily():
            return next(bench._batches(case, of, case.config, torch.device("cpu")))

    method: Any = case.method
    (found,) = predict_of(models, case.config, method, plan if method == "network" else None, [batch], card=card)
    return device(case.config, found)


def device(settings: Config, found: Predicted) -> int:
    m, calls = settings.memory, range(len(found.step.records))
    again = list(calls)[m.gradient_checkpointing_every - 1 :: m.gradient_checkpointing_every]
    peaks = found.step.peaks(again if m.gradient_checkpointing else ())
    return found.weights.total + max(*(p.total for p in peaks.values()), found.gradients + found.update)


def counted(case: bench.Case, folder: Path) -> int:
    """Bytes of a second step that is done."""
    made = bench._Bench.of(case, folder, torch.device("cpu"))
    models: Any = made.run.trainable.models  # type: ignore[attr-defined]
    tracker = Tracker()
    nets = (models.denoiser, made.run.trainable.modules())
    tracker.know(t for net in nets for t in (*net.parameters(), *net.buffers()))
    with tracker:
        for _ in range(2):
            made._step(next(made.batches))
    return tracker.peak


def apart(job: Callable[[Path], int]) -> int:
    with TemporaryDirectory() as folder:
        return job(Path(folder))


def row(family: str, name: str, args: argparse.Namespace) -> str:
    method, memory = SETTINGS[name]
    whole = outlines.usual(family)
    few = {part: outlines.fewer(shapes, args.share) for part, shapes in whole.items()}
    case = bench.Case(
        family=family, method=method, config=config(family, method, memory), parts=few, resolution=args.resolution
    )
    large = replace(case, parts=whole, resolution=1024)
    guess, taken = apart(lambda f: predicted(case, f, card=False)), apart(lambda f: counted(case, f))
    card = apart(lambda f: predicted(large, f, card=True))
    return (
        f"| {family} | {name} | {guess / GIB:.3f} | {taken / GIB:.3f} | {guess / taken - 1:+.1%} | {card / GIB:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--resolution", type=int, default=128, help="of the steps that are done")
    parser.add_argument("--share", type=float, default=0.05, help="of the blocks, in these")
    args = parser.parse_args()
    print("| family | training | predicted | counted | | whole net at 1024 px on a card, predicted |")
    print("|---|---|---|---|---|---|")
    for family in args.families:
        for name in args.settings:
            print(row(family, name, args), flush=True)


if __name__ == "__main__":
    main()
