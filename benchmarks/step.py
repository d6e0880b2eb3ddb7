"""Seconds per step and peak memory of training nets of full size with random weights, on the accelerator at hand.

Names and shapes come from the headers of real checkpoints. Latents and text are random and count as cached, so this is
the training step alone: forward, backward, clipping and AdamW, as `train/loop.py` does them.

    python benchmarks/step.py                        # every family and variant: rank 16, 1024 px, batch 1, bf16
    python benchmarks/step.py --families sdxl --variants plain checkpointing --resolution 512
    python benchmarks/step.py --tiny                 # two blocks of each kind and 64 px: does the script run here?
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sparse import sparse  # noqa: E402
from tinies import headers  # noqa: E402

from sfumato import adapters, families  # noqa: E402
from sfumato.config import (  # noqa: E402
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    NetworkConfig,
    SampleConfig,
    TrainConfig,
)
from sfumato.data.batch import Batch  # noqa: E402
from sfumato.models.base import Models  # noqa: E402
from sfumato.optim import build  # noqa: E402
from sfumato.train import devices, dist  # noqa: E402
from sfumato.train.step import Step  # noqa: E402
from sfumato.train.trainables import Adapters, Full, Trainable  # noqa: E402

WARM, ROUNDS, STEPS = 2, 3, 4
"""Steps that are not timed; rounds that are, and steps of each: the device is waited for once a round."""
BLOCKS = re.compile(
    r"(.*(?:joint|double|single|transformer)_blocks|(?!.*distilled)(?:.*\.)?(?:layers|blocks|context_refiner|noise_refiner))\.(\d+)\."
)
VARIANTS = ("checkpointing", "plain", "full", "checkpointing+compiled", "plain+compiled")
"""How a net is trained, the most wanted first. full: all weights, themselves in bf16, with checkpointing; else LoRA."""
FULL = ("sdxl", "lumina2", "anima")
"""Families whose full training fits a card."""

Shapes = dict[str, tuple[int, ...]]
FAMILIES: Mapping[str, tuple[Callable[[], Shapes], Shapes]] = {
    "sdxl": (lambda: headers.table("sdxl.single_file"), {"hidden": (77, 2048), "pooled": (1280,)}),
    "sd3": (
        lambda: headers.sd3("sd3.5_medium", "clip_l", "clip_g", "t5xxl"),
        {
            "clip_l": (77, 768), "clip_l_pooled": (768,), "clip_g": (77, 1280), "clip_g_pooled": (1280,),
            "t5": (256, 4096),
        },
    ),
    "flux": (lambda: headers.comfy("flux_dev"), {"pooled": (768,), "t5": (512, 4096)}),
    # Of one caption all tokens are visible, and there are no more than it needs.
    "chroma": (lambda: headers.without(".*clip_l.*", headers.comfy("chroma")), {"t5": (128, 4096)}),
    "lumina2": (lambda: usual("lumina2"), {"gemma2": (128, 2304)}),
    "hunyuan_image": (lambda: usual("hunyuan_image"), {"text": (128, 3584), "glyphs": (32, 1472)}),
    "anima": (lambda: usual("anima"), {"qwen3": (128, 1024), "t5_ids": (128,)}),
}  # fmt: skip
"""Family -> the tensors of a checkpoint, and what is cached of a caption."""


def usual(family: str) -> Shapes:
    """The tensors of the model that people have."""
    table: Shapes = next(iter(import_module(f"tinies.{family}").USUAL.values()))()
    return table


def two_blocks(table: Shapes) -> Shapes:
    """The same with the first and the last block of each kind: the last one may lack some tensors."""
    last: dict[str, int] = {}
    for m in filter(None, map(BLOCKS.match, table)):
        last[m[1]] = max(last.get(m[1], 0), int(m[2]))
    out: Shapes = {}
    for name, shape in table.items():
        m = BLOCKS.match(name)
        if m is None or int(m[2]) == 0:
            out[name] = shape
        elif int(m[2]) == last[m[1]]:
            out[f"{m[1]}.1.{name[m.end() :]}"] = shape
    return out


def random_models(family: str, variant: str, args: argparse.Namespace, device: torch.device) -> tuple[Config, Models]:
    """A config and the model that it names, whose denoiser has small random weights in bf16 on the device."""
    facts, table = families.facts(family), FAMILIES[family][0]()
    with tempfile.TemporaryDirectory() as folder:
        path = sparse(Path(folder) / "model.safetensors", two_blocks(table) if args.tiny else table)
        config = Config(
            # What is cached needs no tokenizer: any folder will do.
            model=ModelConfig(pretrained_model_name_or_path=str(path), tokenizer=folder),
            data=DataConfig(cache_latents=True, cache_text_encoder_outputs=True),
            train=TrainConfig(mixed_precision="bf16", full_bf16=variant == "full"),
            memory=MemoryConfig(gradient_checkpointing="plain" not in variant),
            network=NetworkConfig(network_dim=args.rank, network_alpha=args.rank),
            sample=SampleConfig(sample_sampler=str(facts.defaults.get("sample_sampler", "ddim"))),
            family=facts.options(),
        )
        models = devices.outline_models(config)
    net = models.denoiser.to(torch.bfloat16).to_empty(device=device)
    for name, tensor in net.state_dict().items():
        if tensor.ndim > 1:
            nn.init.normal_(tensor, std=0.02)
        else:
            nn.init.constant_(tensor, 0 if name.endswith("bias") else 1)
    net.requires_grad_(False).eval()
    return config, models


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each transformer block by itself, of a U-Net's blocks those within: all of a kind share their code."""
    torch._dynamo.config.recompile_limit = 64
    inner = [
        block
        for outer in blocks
        for part in outer.modules()
        if isinstance(part, nn.ModuleList)
        for block in part
    ]  # fmt: skip
    for block in inner or blocks:
        block.compile(dynamic=False)


def training_step(
    family: str, variant: str, args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    """A function that trains a step and gives its loss, and what there is to say of it."""
    config, models = random_models(family, variant, args, device)
    trainable = (
        Full(models, config)
        if variant == "full"
        else Adapters(models, config, adapters.parse(config.network, families.facts(family).network_args))
    )
    trainable.modules().to(device)
    devices.apply_memory_options(models.family.blocks(models.denoiser), config.memory, device)
    if "compiled" in variant:
        compile_blocks(models.family.blocks(models.denoiser))
    batch = random_batch(models, FAMILIES[family][1], args.resolution).to(device)
    return stepper(config, models, trainable, batch), {
        "parameters": sum(p.numel() for p in models.denoiser.parameters()),
        "trained": sum(p.numel() for p in trainable.weights().values()),
    }


def stepper(config: Config, models: Models, trainable: Trainable, batch: Batch) -> Callable[[], Tensor]:
    """A function that trains a step and gives its loss."""
    process = models.process(config.noise, config.loss)
    step = Step(models, trainable, process, config.loss, dist.precision(config.train.mixed_precision))
    optimizer = build.optimizer(config.optimizer, trainable.groups())
    if config.train.full_bf16:
        optimizer = build.in_low_bits(optimizer, config.train.seed)
    trainable.train(True)

    def go() -> Tensor:
        loss: Tensor = step(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.weights().values(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return go


def random_batch(models: Models, text: Mapping[str, tuple[int, ...]], resolution: int, size: int = 1) -> Batch:
    """`size` samples, whose latents and text are cached."""
    g = torch.Generator().manual_seed(0)
    side = resolution // models.family.latents.stride
    return Batch(
        captions=[""] * size,
        keys=list(range(1, size + 1)),
        weight=torch.ones(size),
        multiplier=torch.ones(size),
        sizes=torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * size),
        latents=torch.randn(size, models.family.latents.channels, side, side, generator=g),
        cond={
            name: torch.randint(1, 1000, (size, *shape), generator=g)
            if name.endswith("_ids")
            else torch.randn(size, *shape, generator=g).bfloat16()
            for name, shape in text.items()
        },
    )


def measure(family: str, variant: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The figures of one family, trained in one way."""
    began = time.monotonic()
    go, figures = training_step(family, variant, args, device)
    wait(device)
    ready = time.monotonic()
    flops: float | None = None
    if "compiled" in variant:
        go()
    else:
        with FlopCounterMode(display=False) as counter:
            go()
        flops = counter.get_total_flops()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # counting takes memory of its own
    first, times, losses = time.monotonic() - ready, [], []
    warm, rounds, steps = (0, 1, 1) if args.tiny else (WARM, ROUNDS, STEPS)
    for count in [warm, *[steps] * rounds]:
        start = time.monotonic()
        losses += [go() for _ in range(count)]
        wait(device)
        times.append((time.monotonic() - start) / max(count, 1))
    seconds = sorted(times[1:])
    return {
        **figures,
        "ready_s": round(ready - began, 2),
        "first_step_s": round(first, 2),
        "seconds_per_step": round(seconds[len(seconds) // 2], 4),
        "rounds_s": [round(s, 4) for s in seconds],
        "tflop_per_step": flops and round(flops / 1e12, 2),
        "peak_gib": round(devices.peak_memory(device) / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if device.type == "cuda" else None,
        "loss": round(losses[-1].item(), 4),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def isolated(limit: float, device: torch.device, figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `figures` finds, or its error: a case that fails leaves the next ones alone. `limit`: in seconds."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with at_most(limit):
            return figures()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0][:300]}"}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Errors: `TimeoutError` in what takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "device": torch.cuda.get_device_name(),
            "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
            "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
            "cuda": torch.version.cuda,
        }
    return found


def record(out: Path | None, section: str, device: torch.device, content: Mapping[str, Any]) -> None:
    """Write one section of a file of results; the others stay."""
    if out is not None:
        sections = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        sections |= {section: {**machine(device), "command": shlex.join(sys.argv), **content}}
        out.write_text(json.dumps(sections, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--resolution", type=int, help="default: 1024")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="two blocks of each kind and 64 px, to see that it runs")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no further case begins")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one case may take")
    parser.add_argument("--out", type=Path, help="the JSON file that gets the section `step`; default: none is written")
    args = parser.parse_args()
    args.resolution = args.resolution or (64 if args.tiny else 1024)
    began, device, rows = time.monotonic(), dist.device_of(), []
    for variant in args.variants:
        for family in args.families:
            left = args.budget - (time.monotonic() - began)
            if variant == "full" and family not in FULL:
                continue
            row: dict[str, Any] = {"family": family, "variant": variant}
            if left <= 0:
                row["error"] = "the time was used up"
            else:
                limit = min(args.limit, left + 30)
                row |= isolated(limit, device, lambda f=family, v=variant: measure(f, v, args, device))  # type: ignore[misc]
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
            shared = {"resolution": args.resolution, "rank": args.rank, "tiny": args.tiny}
            record(args.out, "step", device, {**shared, "rows": rows})


if __name__ == "__main__":
    main()
