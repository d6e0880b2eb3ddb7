"""Seconds per step of every kind of adapter on the model in the box, and what that is of LoRA's, in one run.

The model of `examples/emoji` with the quickstart's settings: rank 16, 8 on convolutions above 1x1, batch 10, 64 px.
LoHa's ranks are the roots of those: its change has then the same rank as LoRA's (--same_dim: the same network_dim).
Latents and text are random and count as cached. The kinds take turns, step by step, and the fastest step of each
counts; on the CPU its own time counts, of all threads, and not the clock's: other work falls on none of them.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --kinds lora loha --same_dim
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from step import ROOT, random_batch, record, stepper, wait
from torch import Tensor

import sfumato
from sfumato import adapters, families
from sfumato.config import Config, DataConfig, ModelConfig, NetworkConfig, TrainConfig
from sfumato.train import dist
from sfumato.train.trainables import Adapters

MODEL = ROOT / "examples" / "emoji" / "model.safetensors"
ROOTS = {"loha"}
"""Kinds whose change has the square of their rank."""


def training_step(
    kind: str, rank: int, conv: int, args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], Tensor], int]:
    """A function that trains a step, and how many numbers are trained."""
    models = sfumato.load(
        MODEL, device=device, dtype=torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    )
    config = Config(
        model=ModelConfig(pretrained_model_name_or_path=str(MODEL)),
        data=DataConfig(cache_latents=True, cache_text_encoder_outputs=True),
        train=TrainConfig(mixed_precision=args.mixed_precision),
        network=NetworkConfig(
            network_module=kind,
            network_dim=rank,
            network_alpha=rank,
            network_args=(f"conv_dim={conv}", f"conv_alpha={conv}", *args.network_args),
            network_train_unet_only=True,
        ),
        family=models.options,
    )
    plan = adapters.parse(config.network, families.facts(models.family.name).network_args)
    trainable = Adapters(models, config, plan)
    trainable.modules().to(device)
    text = {name: tuple(t.shape[1:]) for name, t in models.encode(models.tokenize([""])).items()}
    batch = random_batch(models, text, resolution=64, size=args.batch).to(device)
    return stepper(config, models, trainable, batch), sum(p.numel() for p in trainable.weights().values())


def timed(steps: Mapping[str, Callable[[], Tensor]], count: int, device: torch.device) -> dict[str, float]:
    """Seconds of the fastest of `count` steps of each kind, after two that do not count."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(count + 2):
        for kind, go in steps.items():
            wait(device)
            start = clock()
            go()
            wait(device)
            seconds[kind].append(clock() - start)
    return {kind: min(own[2:]) for kind, own in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=list(adapters.kinds()), choices=list(adapters.kinds()))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--conv_rank", type=int, default=8)
    parser.add_argument("--same_dim", action="store_true", help="the same network_dim for all kinds")
    parser.add_argument("--network_args", nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--out", type=Path, help="the JSON file that gets the section `adapters`; default: none is written"
    )
    args = parser.parse_args()
    device, rows = dist.device_of(), {}
    steps = {}
    for kind in ["lora", *(k for k in args.kinds if k != "lora")]:
        root = kind in ROOTS and not args.same_dim
        rank, conv = (math.ceil(math.sqrt(r)) if root else r for r in (args.rank, args.conv_rank))
        steps[kind], trained = training_step(kind, rank, conv, args, device)
        rows[kind] = {"network_dim": rank, "conv_dim": conv, "trained": trained}
    seconds = timed(steps, args.steps, device)
    for kind, row in rows.items():
        row |= {"seconds_per_step": round(seconds[kind], 4), "of_lora": round(seconds[kind] / seconds["lora"], 3)}
        print(f"{kind:<8}" + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    settings = {name: getattr(args, name) for name in ("network_args", "batch", "mixed_precision", "steps")}
    record(args.out, "adapters", device, {**settings, "kinds": rows})


if __name__ == "__main__":
    main()
