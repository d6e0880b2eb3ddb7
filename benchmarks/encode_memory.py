"""Peak host memory of encoding captions with text encoders of full size, read block by block from their files.

Writes each encoder's file with the names and shapes of the real one, and a hole where the values would be (no room on
the disk), encodes two captions of 32 tokens on the accelerator, or the CPU where there is none, in a process of its
own, and takes how far that process's memory grew over what it had after its imports. Needs some GB of memory; about ten
minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from load_memory import GB, ROOT, machine, resident

sys.path.insert(0, str(ROOT / "tests"))
KEYS = ROOT / "tests" / "fixtures" / "keys"
RESULTS = Path(__file__).with_name("results") / "encode_memory.json"
ENCODERS = {"qwen25vl": ("qwen2_5_vl_7b.hf", "BF16"), "t5xxl": ("t5xxl.hf", "F16")}
"""Text encoder -> the table of its file, and the format that it is published in."""
CASES = [(name, target) for name in ENCODERS for target in ("bfloat16", "float32")]
CAPTIONS, TOKENS = 2, 32
BATCH = 8
"""Captions that are encoded together when they are kept."""
ALLOWED = 2.5
"""GB of growth."""


def peak() -> int:
    """The most resident memory since `forget_peak`, mapped pages of files included, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    """Count peaks anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Own:
    """The most memory of this process's own (RssAnon), looked at every 5 ms."""

    def __init__(self) -> None:
        self.most, self._going = 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._going:
            self.most = max(self.most, resident()["own"])
            time.sleep(0.005)

    def stop(self) -> int:
        self._going = False
        self._thread.join()
        return self.most


class Strategy:
    """Stands in for a family's tokenizer and its use of one encoder: ids of a fixed length."""

    settings: Mapping[str, object] = {}

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens = name, tokens

    def tokenize(self, captions: Sequence[str], **_: object) -> Mapping[str, Any]:
        import torch

        return {"ids": torch.arange(len(captions) * self.tokens).view(len(captions), self.tokens) % 1000}

    def encode(self, encoders: Mapping[str, Any], tokens: Mapping[str, Any]) -> Mapping[str, Any]:
        net = encoders[self.name]
        return {"states": net(tokens["ids"].to(next(net.parameters()).device))}


def measure(
    path: str, name: str, target: str, captions: int = CAPTIONS, tokens: int = TOKENS, whole: bool = False
) -> Mapping[str, float]:
    """Encode with the encoder of this file in this process, block by block, or with all of it in memory (`whole`). All
    that is imported for it is imported before."""
    import torch
    import transformers

    from sfumato import families
    from sfumato.models import streaming
    from sfumato.models.base import Models
    from sfumato.models.components import Checkpoint, open_component
    from sfumato.models.encoders.llm import qwen25vl_component
    from sfumato.models.encoders.t5 import t5_component
    from sfumato.train import devices, dist

    device = dist.device_of()
    component = {"qwen25vl": qwen25vl_component, "t5xxl": t5_component}[name]((), "")
    assert transformers.T5EncoderModel and transformers.Qwen2Model
    strategy, carrier = Strategy(name, tokens), families.family(families.names()[0])
    family = replace(carrier, tokenize=lambda models: strategy, encode=lambda models: strategy)
    # The library of matrix products takes its own memory when it is first used.
    assert (torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)).sum().item()
    forget_peak()
    before, own = resident(), Own()
    weights = open_component(component, path)
    dtype, begun = getattr(torch, target), time.monotonic()
    models = Models(
        family, None, torch.nn.Linear(1, 1), {name: weights.empty()}, {}, None,
        Checkpoint(path=Path(path), components={name: weights}), {name: dtype},
    )  # fmt: skip
    if whole:
        weights.put_into(models.encoders[name], dtype).to(device)
    else:
        models.streamed = frozenset([name])
    size, done = streaming.sizes(models, {name: dtype})[name], 0
    batches = [["a caption"] * min(BATCH, captions - start) for start in range(0, captions, BATCH)]
    for cond in streaming.encode_each(models, batches, device):
        states = cond["states"].cpu()
        done += len(states)
        assert states.shape[1] == tokens and states.dtype == dtype
    assert done == captions
    return {
        "whole_gb": size / GB,
        "baseline_gb": sum(before.values()) / GB,
        "growth_gb": (peak() - sum(before.values())) / GB,
        "own_gb": (own.stop() - before["own"]) / GB,
        "device_gb": devices.peak_memory(device) / GB if device.type != "cpu" else 0.0,
        "seconds": time.monotonic() - begun,
    }


def run(path: Path, name: str, target: str, given: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--measure", str(path), name, target]
    command += ["--captions", str(given.captions), "--tokens", str(given.tokens), *(["--whole"] if given.whole else [])]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


COLUMNS = ("encoder", "file", "target", "whole_gb", "baseline_gb", "growth_gb", "own_gb", "device_gb", "seconds")


def rows(cases: Sequence[tuple[str, str]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases, one after another."""
    from sparse import sparse

    made = []
    with tempfile.TemporaryDirectory() as folder:
        for name, target in cases:
            table, stored = ENCODERS[name]
            shapes = json.loads(gzip.decompress((KEYS / f"{table}.json.gz").read_bytes()))
            path = sparse(Path(folder) / f"{name}.safetensors", shapes, stored)
            found = {"encoder": name, "file": stored, "target": target, **run(path, name, target, given)}
            made.append({name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()})
            print(table_of(made[-1:]), flush=True)
    return made


def table_of(made: list[dict[str, Any]]) -> str:
    """Rows for a reader."""
    return "\n".join("".join(f"{row[name]:>{max(len(name), 8) + 2}}" for name in COLUMNS) for row in made)


def main() -> None:
    """Measure, print the table, write the results; ends with 1 where more memory was needed than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of the results (default: %(default)s)")
    parser.add_argument("--encoder", choices=ENCODERS, help="this one alone")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each (default: %(default)s)")
    parser.add_argument("--format", choices=("bfloat16", "float32"), help="this one alone")
    parser.add_argument("--whole", action="store_true", help="the encoder in memory whole, to compare with")
    parser.add_argument("--measure", nargs=3, metavar=("FILE", "ENCODER", "FORMAT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure, given.captions, given.tokens, given.whole)))
        return
    print("".join(f"{name:>{max(len(name), 8) + 2}}" for name in COLUMNS))
    wanted = [case for case in CASES if given.encoder in (None, case[0]) and given.format in (None, case[1])]
    made = rows(wanted, given)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "captions": given.captions, "tokens": given.tokens, "rows": made}
    facts |= {"whole": True} if given.whole else {"allowed_gb": ALLOWED}
    given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if not given.whole and (over := [row for row in made if row["growth_gb"] > ALLOWED]):
        raise SystemExit(f"more than {ALLOWED} GB:\n{table_of(over)}")


if __name__ == "__main__":
    main()
