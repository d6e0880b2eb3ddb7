"""How long a training of many images takes to its first step, the first time and the second.

    python benchmarks/scale.py [--images 100000] [--folder DIR] [--out benchmarks/results/scale.json]

Makes a folder of small images, each with a caption of its own, and trains the bundled model on them for one step, three
times, latents and text outputs cached on the disk: the first run decodes all images and fills the cache, the others
find all of it. In the first, stand-ins take the place of VAE and text encoder, whose time is the model's, not that of
what is around them. Each run is a process of its own, with one thread; what counts is the processor's time, as others
may use the machine. `--profile` prints where a second start spends it. `--folder`: images and cache are kept there, and
what is there is used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "scale.json"
MODEL = ROOT / "examples" / "emoji" / "model.safetensors"
SIZES = ((64, 64), (64, 64), (80, 48), (48, 80), (96, 64))
WORDS = ("red", "green", "small", "round", "old", "paper", "dog", "tree", "river", "cup", "night")
A_FOLDER = 100_000
"""Images that lie in one folder; more are in several."""


def make(where: Path, count: int) -> None:
    """`count` images, each of other bytes and with another caption; those that are there stay."""
    for number in range(count):
        folder = where / f"{number // A_FOLDER}"
        if not number % A_FOLDER:
            folder.mkdir(parents=True, exist_ok=True)
        path, rng = folder / f"image_{number:06}.png", random.Random(number)
        if path.exists():
            continue
        small = np.frombuffer(rng.randbytes(4 * 4 * 3), np.uint8).reshape(4, 4, 3)
        path.with_suffix(".txt").write_text(f"thing {number}, {', '.join(rng.choices(WORDS, k=12))}\n")
        Image.fromarray(small).resize(SIZES[number % len(SIZES)], Image.Resampling.NEAREST).save(path)


def command(where: Path, out: Path) -> list[str]:
    """A training of one step."""
    return [
        *(
            "train",
            "network",
            "--pretrained_model_name_or_path",
            str(MODEL),
            "--dataset_config",
            str(out / "data.toml"),
        ),
        *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--cache_dir", str(where / "cache")),
        *("--network_train_unet_only", "--max_train_steps", "1", "--network_dim", "4", "--vae_batch_size", "16"),
        *("--output_dir", str(out), "--output_name", "scale"),
    ]


def dataset(where: Path, out: Path) -> None:
    """The dataset file of all folders of images."""
    folders = sorted(path for path in (where / "images").iterdir() if path.is_dir())
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(path))}\n" for path in folders)
    settings = "resolution = 64\nbatch_size = 4\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 16\n"
    (out / "data.toml").write_text(f"[[datasets]]\n{settings}{subsets}", encoding="utf-8")


def stand_in() -> None:
    """Have latents and text outputs of the right shapes without a net's work."""
    from collections.abc import Iterator

    from torch import Tensor
    from torch.nn import functional

    from sfumato.data.batch import Cond
    from sfumato.models.base import Models
    from sfumato.train import caching

    def means(models: Models, pixels: Tensor) -> Tensor:
        return functional.avg_pool2d(pixels, models.family.latents.stride).mean(1, keepdim=True).repeat(1, 4, 1, 1)

    def copies(models: Models, batches: Sequence[Sequence[str]], *others: Any) -> Iterator[Cond]:
        one = next(encode(models, [["a caption"]], *others)) if batches else {}
        for batch in batches:
            yield {name: t.expand(len(batch), *t.shape[1:]) for name, t in one.items()}

    encode = caching.encode_each
    Models.encode_images, caching.encode_each = means, copies  # type: ignore[assignment, method-assign]


def measure(arguments: Sequence[str], profile: str, first: bool) -> None:
    """Run sfumato in this process and print what it took: seconds of the clock and of the processor until it is
    ready for the first step, and in all; the most memory; bytes written."""
    import cProfile
    import pstats

    began, profiler, ready = time.monotonic(), cProfile.Profile(), list[float]()
    from sfumato.cli.main import main as sfumato
    from sfumato.train import loop

    train = loop.train
    loop.train = lambda run: (ready.extend([time.monotonic() - began, time.process_time()]), train(run))[1]

    if first:
        stand_in()
    if profile:
        profiler.enable()
    code = sfumato(list(arguments))
    profiler.disable()
    if profile:
        pstats.Stats(profiler).sort_stats(profile).print_stats(45)
    used = resource.getrusage(resource.RUSAGE_SELF)
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    found = {
        "code": code,
        "ready_seconds": ready[0],
        "ready_cpu_seconds": ready[1],
        "seconds": time.monotonic() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "system_seconds": used.ru_stime,
        "memory_mb": used.ru_maxrss / 1024,
        "written_mb": int(io["write_bytes"]) / 1e6,
    }
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


def run(where: Path, profile: str = "", *, first: bool = False) -> Mapping[str, float]:
    """A training in a fresh process."""
    with tempfile.TemporaryDirectory() as out:
        dataset(where, Path(out))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        line = [
            sys.executable,
            __file__,
            f"--profile={profile}",
            *["--first"] * first,
            "--measure",
            *command(where, Path(out)),
        ]
        output = subprocess.run(line, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    if profile:
        print(output)
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    if found.pop("code"):
        raise SystemExit(output)
    return found


def size(folder: Path) -> tuple[int, int]:
    """(files, bytes on the disk) of a folder, all below it."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return len(found), sum(each.st_blocks * 512 for each in found)


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where images and cache are kept (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--profile", default="", help="cumtime or tottime: profile a second start, and measure nothing")
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        return measure(given.measure, given.profile, given.first)
    with tempfile.TemporaryDirectory() as temporary:
        where = (given.folder or Path(temporary)).absolute()
        make(where / "images", given.images)
        if given.profile:
            run(where, given.profile)
            return
        rows: dict[str, Any] = {"images": given.images}
        for name in ("first", "second", "third"):
            rows[name] = run(where, first=name == "first")
            print(name, rows[name], flush=True)
        rows["cache_files"], rows["cache_bytes"] = size(where / "cache")
    print(json.dumps(rows))
    if given.out:
        machine = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
        given.out.write_text(json.dumps({"machine": machine, **rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
