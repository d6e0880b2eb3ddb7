"""Time and peak memory of merging a LoRA into a checkpoint, beside a plain copy of that file.

Writes a transformer of full size with random values in 16 bits (SD3 medium: 4.2 GB) and a LoRA on all its layers into a
temporary folder, copies the file and merges the LoRA, in turns and each in a process of its own. Needs three times
the file's size of disk for a while, and some minutes. Prints JSON; --keep writes it to benchmarks/results/merge.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).with_name("results") / "merge.json"
MB = 2**20


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the denoiser of a family's first usual model."""
    from sfumato.models.reference import usual_models

    return next(iter(usual_models(ROOT / "sfumato" / "families" / family).values()))["denoiser"]


def write(folder: Path, family: str, rank: int) -> None:
    """The checkpoint and the LoRA, a tensor at a time."""
    import torch

    from sfumato.adapters import files as adapter_files
    from sfumato.formats.dialect import ALPHA, DOWN, UP
    from sfumato.formats.files import save
    from sfumato.formats.planned import PlannedTensor
    from sfumato.tools.adapter_file import usual_outlines

    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        size = math.prod(shape)
        return noise.repeat(-(-size // len(noise)))[:size].mul(0.05).view(shape).half()

    shapes = shapes_of(family)
    planned = {n: PlannedTensor(torch.float16, s, lambda s=s: random(s)) for n, s in shapes.items()}
    save(folder / "model.safetensors", planned)
    outline = usual_outlines(family)[0]
    state = {
        layer: {
            DOWN: random((rank, *shape[1:])),
            UP: random((shape[0], rank, *[1] * (len(shape) - 2))),
            ALPHA: torch.tensor(float(rank)),
        }
        for layer, shape in outline.layers.items()
        if layer[0] == "denoiser"
    }
    save(folder / "lora.safetensors", adapter_files.write(outline.dialects["kohya"], state))


def copy(folder: Path) -> dict[str, Any]:
    """A plain copy, which is on the disk when it ends, as what is merged is."""
    out = folder / "copy.safetensors"
    started = time.monotonic()
    shutil.copyfile(folder / "model.safetensors", out)
    handle = os.open(out, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    seconds = time.monotonic() - started
    out.unlink()
    return {"seconds": seconds}


def merge(folder: Path) -> dict[str, Any]:
    """The merge, without Python's and torch's imports, whose memory is the base of the peak."""
    from sfumato.tools.merge import Merging
    from sfumato.tools.merge import merge as tool

    before = peak()
    out = folder / "merged.safetensors"
    started = time.monotonic()
    facts = tool(Merging(model=folder / "model.safetensors", adapters=[(folder / "lora.safetensors", 0.8)], out=out))
    seconds = time.monotonic() - started
    out.unlink()
    return {"seconds": seconds, "before": before, "peak": peak(), "layers": facts["adapters"][0]["layers"]}


def peak() -> float:
    """MiB of this process at most until now; getrusage would count the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def in_a_process(job: str, folder: Path) -> dict[str, Any]:
    """A job's result."""
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, "--job", job, "--folder", str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="sd3")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the files are written for a while")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--job", choices=("copy", "merge"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps({"copy": copy, "merge": merge}[args.job](args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write(folder, args.family, args.rank)
        runs = [(in_a_process("copy", folder), in_a_process("merge", folder)) for _ in range(args.rounds)]
        sizes = {path.stem: path.stat().st_size / MB for path in folder.iterdir()}
    copied, merged = (min(runs_of, key=lambda run: run["seconds"]) for runs_of in zip(*runs, strict=True))
    tensor = max(map(math.prod, shapes_of(args.family).values())) * 4 / MB
    grown = max(run["peak"] - run["before"] for _, run in runs)
    result = {
        "command": " ".join(["python", "benchmarks/merge.py", *sys.argv[1:]]),
        "load_average": os.getloadavg()[0],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "family": args.family,
        "rank": args.rank,
        "files_mib": sizes,
        "layers": merged["layers"],
        "copy_seconds": [run["seconds"] for run, _ in runs],
        "merge_seconds": [run["seconds"] for _, run in runs],
        "time_of_a_copy": merged["seconds"] / copied["seconds"],
        "peak_mib": max(run["peak"] for _, run in runs),
        "grown_mib": grown,
        "largest_tensor_fp32_mib": tensor,
        "above_one_tensor_mib": grown - tensor,
        "holds": {"time": merged["seconds"] <= 2 * copied["seconds"], "memory": grown - tensor < 1024},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.keep:
        RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
