"""Whether a cache that is filled by two processes at once survives `kill -9`, thirty times.

    python benchmarks/killed_caching.py [--kills 30] [--images 400] [--out benchmarks/results/killed_caching.json]

Two processes fill one cache of one folder; after a random while one of them, or both, is killed and started again,
until all is done. Every entry that was stored is noted by whoever stored it. At the end nothing is lacking, nothing was
stored twice, and every entry is what a process alone makes of its image. `unfinished`: files that a killed process was
writing, which are removed when they are ten minutes old. VAE and text encoder are stand-ins that take milliseconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from folders import dataset, encode, folder, latents, plan, subset, texts

from sfumato.data import claims
from sfumato.data.store import FileIndex, TensorStore


class Noting(TensorStore):
    """A store that notes what was put into it."""

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().put(name, tensors)
        assert self.root is not None
        log = os.open(self.root.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"{name}\n".encode())
        os.close(log)


def fill(where: Path) -> None:
    """One process's work: both caches of the folder."""
    claims.SHARE = 16

    def slow(pixels: Tensor) -> Tensor:
        time.sleep(0.004)
        return encode(pixels)

    index, store = FileIndex(where / "cache"), Noting(where / "cache")
    made = plan(dataset(subset(where / "images")), index=index)
    latents(made, store, index, encode=slow)
    texts(made, store, index)


def check(where: Path, count: int) -> dict[str, int]:
    """What was stored and what stands there. Errors: `AssertionError`."""
    noted = Counter((where / "log").read_text(encoding="utf-8").split())
    index, store, alone = FileIndex(where / "cache"), TensorStore(where / "cache"), TensorStore()
    made = plan(dataset(subset(where / "images")), index=index)
    found = [make(made, store, index) for make in (latents, texts)]
    assert [(each.found, each.encoded) for each in found] == [(count, 0)] * 2, "something is lacking"
    expected = [make(made, alone, FileIndex()) for make in (latents, texts)]
    for ours, theirs in zip(found, expected, strict=True):
        for what, name in ours.keys.items():
            entry, other = store.get(name) or {}, alone.get(theirs.keys[what]) or {}
            assert entry.keys() == other.keys() and all(torch.equal(entry[k], other[k]) for k in other), "is wrong"
    twice = [name for name, times in noted.items() if times > 1]
    assert not twice, f"{len(twice)} entries were stored twice"
    files = list((where / "cache" / "entries").glob("*/*"))
    unfinished = sum(path.name.startswith(".") for path in files)
    assert len(files) == 2 * count + unfinished, "there are other files"
    return {"entries": 2 * count, "noted": len(noted), "unfinished": unfinished}


def main() -> None:
    """Kill, check, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    given = parser.parse_args()
    rng, kills = random.Random(given.seed), 0
    rows: list[dict[str, Any]] = []
    fork = multiprocessing.get_context("fork")  # else starting takes longer than the work
    with tempfile.TemporaryDirectory() as temporary:
        while kills < given.kills:
            where = Path(temporary) / str(len(rows))
            folder(where / "images", [(64, 64)] * given.images)
            here, killed = 0, 0
            running = [fork.Process(target=fill, args=(where,)) for _ in range(2)]
            for process in running:
                process.start()
            while kills < given.kills and here < 10 and any(process.is_alive() for process in running):
                time.sleep(rng.uniform(0.05, 0.6))
                for i in rng.choice([[0], [1], [0, 1]]):
                    if running[i].is_alive():
                        os.kill(running[i].pid or 0, signal.SIGKILL)
                        killed, kills, here = killed + 1, kills + 1, here + 1
                    running[i].join()
                    running[i] = fork.Process(target=fill, args=(where,))
                    running[i].start()
            for process in running:
                process.join()
                assert process.exitcode == 0
            rows.append({"kills": killed, **check(where, given.images)})
            print(rows[-1], flush=True)
    if given.out:
        given.out.write_text(json.dumps({"kills": kills, "rounds": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
