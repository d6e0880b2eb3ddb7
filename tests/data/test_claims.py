"""Two processes that fill one cache make each entry once, and what a killed one began is made by the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from folders import dataset, encode, folder, latents, plan, subset
from torch import Tensor

from sfumato.data import claims
from sfumato.data.claims import shares
from sfumato.data.store import FileIndex, TensorStore, key


@dataclass(frozen=True)
class Job:
    key: str


JOBS = [Job(key({"i": i})) for i in range(7)]
PORTIONS = [JOBS[:2], JOBS[2:4], JOBS[4:6], JOBS[6:]]


def put(store: TensorStore, share: list[list[Job]]) -> list[str]:
    names = [job.key for portion in share for job in portion]
    for name in names:
        store.put(name, {"x": torch.zeros(1)})
    return names


def test_each_entry_is_made_once_and_those_of_a_process_that_ended_by_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "PAUSE", 0)
    store, index = TensorStore(tmp_path), FileIndex(tmp_path)
    first, second = (shares(store, index, PORTIONS, size=2) for _ in range(2))
    a, b = next(first), next(second)  # the first two are claimed, and left out
    assert a == PORTIONS[:1] and b == []
    b = next(second)
    assert b == PORTIONS[1:2]
    made = put(store, a) + put(store, b)
    a = next(first)
    assert a == []
    a = next(first)
    assert a == PORTIONS[2:3]
    first.close()  # it ends without having made them
    for share in second:
        made += put(store, share)
    assert sorted(made) == sorted(job.key for job in JOBS)
    assert not any((tmp_path / "making").iterdir())
    assert list(shares(store, index, PORTIONS, size=99)) == [[]]


def test_a_store_in_memory_is_nobody_elses(tmp_path: Path) -> None:
    assert list(shares(TensorStore(), FileIndex(tmp_path), PORTIONS, size=1)) == [PORTIONS]


KILLED = """
import os, signal, sys
from pathlib import Path
from folders import dataset, encode, latents, plan, subset
from sfumato.data import claims
from sfumato.data.store import FileIndex, TensorStore

images, cache, calls = Path(sys.argv[1]), Path(sys.argv[2]), []
claims.SHARE = 8

def dying(pixels):
    calls.append(1)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(pixels)

index = FileIndex(cache)
latents(plan(dataset(subset(images)), index=index), TensorStore(cache), index, encode=dying)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system kills in another way")
def test_a_killed_process_and_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = folder(tmp_path / "p", [(64, 64)] * 60), tmp_path / "cache"
    here = Path(__file__).parent.parent
    path = os.pathsep.join([str(here), str(here.parent)])
    other = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(images), str(cache)], env=os.environ | {"PYTHONPATH": path}
    )
    while not any(cache.glob("entries/*/[!.]*")) and other.poll() is None:
        time.sleep(0.01)
    made = Counter[bytes]()

    def slow(pixels: Tensor) -> Tensor:
        time.sleep(0.005)
        made.update(bytes(p.numpy().tobytes()) for p in pixels)
        return encode(pixels)

    def put_once(self: TensorStore, name: str, tensors: Mapping[str, Tensor]) -> None:
        assert name not in self
        put_again(self, name, tensors)

    put_again = TensorStore.put
    monkeypatch.setattr(TensorStore, "put", put_once)
    index, store = FileIndex(cache), TensorStore(cache)
    cached = latents(plan(dataset(subset(images)), index=index), store, index, encode=slow)
    assert other.wait() == -signal.SIGKILL
    assert cached.found + cached.encoded == 60 and cached.encoded == made.total() and max(made.values()) == 1
    alone = latents(plan(dataset(subset(images))), TensorStore(), FileIndex())
    for name in cached.keys.values():
        entry, expected = store.get(name) or {}, alone.store.get(name) or {}
        assert torch.equal(entry["latents"], expected["latents"])
    again = latents(plan(dataset(subset(images)), index=index), store, index, encode=slow)
    assert (again.found, again.encoded) == (60, 0)
