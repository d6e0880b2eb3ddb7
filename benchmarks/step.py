"""Seconds a step and peak memory of training an adapter on nets of full size with random weights, on the accelerator at
hand.

Names and shapes come from the key tables of the real checkpoints. Latents and text are random and count as cached
beforehand, so this is the training step alone: forward, backward, clipping and AdamW, as `train/loop.py` does them.
`--tiny` keeps two blocks of each kind, which shows on a CPU that the script runs.

    python benchmarks/step.py    # SDXL, SD3.5 medium, FLUX.1 dev: rank 16, 1024 px, batch 1, bf16, checkpointing
    python benchmarks/step.py --families sdxl --resolution 512 --no-checkpointing
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import adapters, families
from sfumato.config import Config, LossConfig, MemoryConfig, NetworkConfig, NoiseConfig
from sfumato.data.batch import Batch
from sfumato.memory.plan import apply_memory_options
from sfumato.models.base import Models
from sfumato.optim import build
from sfumato.train.devices import peak_memory
from sfumato.train.step import Step
from sfumato.train.trainables import Adapters

ROOT = Path(__file__).parents[1]
WARM, TIMED = 3, 10
BLOCKS = re.compile(r"((?:joint|double|single|transformer)_blocks)\.(\d+)\.")


def cases(length: int = 512) -> dict[str, dict[str, Any]]:
    """Family -> the table of its denoiser, and the shapes of a caption's text outputs."""
    return {
        "sdxl": {"table": "sdxl.unet", "text": {"hidden": (77, 2048), "pooled": (1280,)}},
        "sd3": {
            "table": "sd3.5_medium.transformer",
            "text": {
                "clip_l": (77, 768), "clip_l_pooled": (768,), "clip_g": (77, 1280), "clip_g_pooled": (1280,),
                "t5": (256, 4096),
            },
        },
        "flux": {"table": "flux_dev.transformer", "text": {"pooled": (768,), "t5": (length, 4096)}},
    }  # fmt: skip


def shapes_of(table: str, *, tiny: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a real denoiser; `tiny`: with two blocks of each kind."""
    read = json.loads(gzip.decompress((ROOT / "tests" / "fixtures" / "keys" / f"{table}.json.gz").read_bytes()))
    found = {name: tuple(shape) for name, shape in read.items()}
    if not tiny or table.startswith("sdxl"):
        return found
    last: dict[str, int] = {}
    for m in filter(None, map(BLOCKS.match, found)):
        last[m[1]] = max(last.get(m[1], 0), int(m[2]))
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in found.items():
        m = BLOCKS.match(name)
        if m is None or int(m[2]) == 0:
            out[name] = shape
        elif int(m[2]) == last[m[1]]:  # the last one may be of another make
            out[name.replace(m[0], f"{m[1]}.1.", 1)] = shape
    return out


def random_net(family: Any, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> nn.Module:
    """A denoiser of these shapes with small random weights, in bf16 on the device."""
    part = next(p for p in family.components if p.name == "denoiser")
    net: nn.Module = part.net(shapes, {}).to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    for tensor in [*net.parameters(), *net.buffers()]:
        nn.init.normal_(tensor, std=0.02) if tensor.ndim > 1 else nn.init.ones_(tensor)
    return net


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One family's figures."""
    case, family = cases()[name], families.family(name)
    shapes = shapes_of(case["table"], tiny=args.tiny)
    config = Config(
        network=NetworkConfig(network_dim=args.rank, network_alpha=args.rank, network_train_unet_only=True),
        memory=MemoryConfig(gradient_checkpointing=args.checkpointing),
        family=families.facts(name).options(),
    )
    began = time.monotonic()
    net = random_net(family, shapes, device)
    options = config.family
    if name == "flux":
        from sfumato.families.flux import facts as flux
        from sfumato.families.flux.family import counts

        options = flux.Completed(guided=True, guidance_scale=1.0, **counts(shapes))
    elif name == "sd3":
        from sfumato.families.sd3 import facts as sd3

        blocks = len({n.split(".")[1] for n in shapes if n.startswith("joint_blocks.")})
        options = sd3.Completed(version="3.5-medium", blocks=blocks, has_t5=True, weighting_scheme="logit_normal")
    vae = nn.Module()
    vae.config = SimpleNamespace(scaling_factor=1.0, shift_factor=None)  # type: ignore[assignment]
    models = Models(family=family, options=options, denoiser=net, encoders={}, tokenizers={}, vaes=vae)
    trainable = Adapters(models, replace(config, family=options), adapters.parse(config.network))
    trainable.modules().to(device)
    apply_memory_options(family.blocks(net), config.memory)
    trainable.train(True)
    step = Step(models, trainable, family.process(models, NoiseConfig(), LossConfig()), LossConfig(), "bf16")
    optimizer = build.optimizer(config.optimizer, trainable.groups())
    batch = random_batch(family, case["text"], args.resolution).to(device)
    ready = time.monotonic() - began
    times, losses = [], []
    for _ in range(WARM + TIMED if not args.tiny else 2):
        wait(device)
        start = time.monotonic()
        loss = step(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.weights().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        times.append(time.monotonic() - start)
        losses.append(loss.item())
    timed = sorted(times[WARM:] or times)
    return {
        "family": name,
        "table": case["table"],
        "parameters": sum(p.numel() for p in net.parameters()),
        "trained": sum(p.numel() for p in trainable.weights().values()),
        "ready_s": round(ready, 2),
        "seconds_a_step": round(timed[len(timed) // 2], 4),
        "peak_gib": round(peak_memory(device) / 2**30, 2),
        "finite": all(abs(loss) < float("inf") for loss in losses),
    }


def random_batch(family: Any, text: Mapping[str, tuple[int, ...]], resolution: int) -> Batch:
    """A batch of one, whose latents and text are cached."""
    g = torch.Generator().manual_seed(0)
    side = resolution // family.latents.stride

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=g)

    return Batch(
        captions=[""],
        keys=[1],
        weight=torch.ones(1),
        multiplier=torch.ones(1),
        sizes=torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]]),
        latents=normal(family.latents.channels, side, side),
        cond={name: normal(*shape).bfloat16() for name, shape in text.items()},
    )


def wait(device: torch.device) -> None:
    """Until the device has done all that was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def machine(device: torch.device) -> dict[str, str]:
    """What the figures belong to."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": card, "torch": torch.__version__, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(cases()), choices=list(cases()))
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--tiny", action="store_true", help="two blocks of each kind and two steps, to see that it runs"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/step.DEVICE.json")
    args = parser.parse_args()
    device = (
        torch.accelerator.current_accelerator() or torch.device("cpu")
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )
    rows = []
    for name in args.families:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rows.append(measure(name, args, device))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    result = {
        **machine(device),
        "resolution": args.resolution,
        "rank": args.rank,
        "checkpointing": args.checkpointing,
        "rows": rows,
    }
    if not args.tiny:
        out = (
            args.out or ROOT / "benchmarks" / "results" / f"step.{re.sub(r'[^A-Za-z0-9]+', '-', result['device'])}.json"
        )
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(out)


if __name__ == "__main__":
    main()
