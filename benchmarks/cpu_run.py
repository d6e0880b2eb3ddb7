"""A LoRA run of Stable Diffusion 1.5's size on the CPU, in two trees of sfumato in turn: processor seconds of a step
and peak memory of the process, as the command line trains.

Writes a checkpoint of full size with random values (2.1 GB) and two small pictures into a temporary folder.

    git worktree add /tmp/before COMMIT
    python benchmarks/cpu_run.py --before /tmp/before --rounds 2
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "cpu_run.json"
STEPS, SIDE = 6, 128
WORDS = (
    f"train network --output_name out --resolution={SIDE},{SIDE} --max_train_steps {STEPS} --network_dim 16 --seed 1 "
    "--learning_rate 1e-4 --cache_latents --cache_text_encoder_outputs --network_train_unet_only --train_batch_size 1"
).split()
GB = 1e9


def own_memory() -> int:
    """Bytes of this process that are of no file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def child(tree: str, words: Sequence[str]) -> None:
    """Train with the sfumato of a tree; prints the figures."""
    sys.path.insert(0, tree)
    from sfumato.cli.main import main
    from sfumato.train import loop

    steps, most, done = list[tuple[float, float]](), [0], threading.Event()
    real = loop._optimizer_step

    def timed(*args: Any) -> Any:
        start = time.process_time(), time.monotonic()
        found = real(*args)
        steps.append((time.process_time() - start[0], time.monotonic() - start[1]))
        return found

    def watch() -> None:
        while not done.wait(0.2):  # its own time counts as well
            most[0] = max(most[0], own_memory())

    loop._optimizer_step = timed  # type: ignore[assignment]
    threading.Thread(target=watch, daemon=True).start()
    start = time.process_time()
    code = main(list(words))
    done.set()
    later = steps[1:]  # in the first one, torch gets its kernels ready
    figures = {
        "code": code,
        "cpu_seconds_per_step": median(s[0] for s in later),
        "seconds_per_step": median(s[1] for s in later),
        "cpu_seconds": time.process_time() - start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB,
        "own_peak_gb": most[0] / GB,
    }
    print("FIGURES " + json.dumps(figures))


def run(tree: Path, folder: Path, name: str) -> dict[str, Any]:
    """One training in a process of its own."""
    files = [f"--pretrained_model_name_or_path={folder / 'model.safetensors'}", f"--train_data_dir={folder / 'data'}"]
    ran = subprocess.run(
        [sys.executable, __file__, "--child", str(tree), *WORDS, *files, f"--output_dir={folder / name}"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    line = next((line for line in ran.stdout.splitlines() if line.startswith("FIGURES ")), None)
    if line is None:
        raise SystemExit(ran.stderr[-3000:])
    losses = [json.loads(x)["loss"] for x in (folder / name / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    return {**json.loads(line.removeprefix("FIGURES ")), "losses": losses}


def prepare(folder: Path) -> None:
    """A checkpoint of full size and two pictures."""
    import numpy as np
    from load_memory import write
    from PIL import Image

    write(folder / "model.safetensors", "fp16")
    pictures = folder / "data" / "1_thing"
    pictures.mkdir(parents=True)
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{i}.png")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other tree")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    from sfumato.tools.bench import machine

    trees, found = {"before": args.before.resolve(), "now": ROOT}, dict[str, list[dict[str, Any]]]()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for number in range(args.rounds):
            for name, tree in trees.items():
                figures = run(tree, Path(folder), f"{name}{number}")
                found.setdefault(name, []).append(figures)
                print(name, json.dumps(figures), flush=True)
    least = {
        name: {key: min(row[key] for row in rows) for key in rows[0] if key != "losses"} for name, rows in found.items()
    }
    RESULTS.write_text(
        json.dumps({"machine": machine(), "least": least, "runs": found}, indent=1) + "\n", encoding="utf-8"
    )
    for key, now in least["now"].items():
        if key != "code":
            print(f"{key}: {least['before'][key]:.3f} -> {now:.3f} ({now / least['before'][key]:.2f})")


if __name__ == "__main__":
    main()
