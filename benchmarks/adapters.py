"""Seconds per step of every kind of adapter on the model in the box, and what that is of LoRA's, in one run.

The model of `examples/emoji` with the quickstart's settings: rank 16, 8 on convolutions above 1x1, batch 10, 64 px.
Latents and text are random and count as cached. Rounds of all kinds take turns, and a kind's ratio is the median of its
rounds' ratios to LoRA's, so that whatever else the machine does falls on all alike.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --kinds lora loha --rank 4 --network_args conv_dim=4 use_tucker=True
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
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
WARM = 2
"""Steps of each kind before the clock starts."""


def training_step(kind: str, args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], Tensor], int]:
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
            network_dim=args.rank,
            network_alpha=args.rank,
            network_args=tuple(args.network_args),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=list(adapters.kinds()), choices=list(adapters.kinds()))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--network_args", nargs="*", default=["conv_dim=8", "conv_alpha=8"])
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument(
        "--out", type=Path, help="the JSON file that gets the section `adapters`; default: none is written"
    )
    args = parser.parse_args()
    device = dist.device_of()
    steps = {kind: training_step(kind, args, device) for kind in ["lora", *(k for k in args.kinds if k != "lora")]}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for count in [WARM, *[args.steps] * args.rounds]:
        for kind, (go, _) in steps.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(count):
                go()
            wait(device)
            seconds[kind].append((time.perf_counter() - start) / count)
    rows = []
    for kind, (_, trained) in steps.items():
        ratios = [own / lora for own, lora in zip(seconds[kind][1:], seconds["lora"][1:], strict=True)]
        row = {
            "kind": kind,
            "seconds_per_step": round(statistics.median(seconds[kind][1:]), 4),
            "of_lora": round(statistics.median(ratios), 3),
            "trained": trained,
        }
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    settings = {name: getattr(args, name) for name in ("rank", "network_args", "batch", "mixed_precision")}
    record(args.out, "adapters", device, {**settings, "rows": rows})


if __name__ == "__main__":
    main()
