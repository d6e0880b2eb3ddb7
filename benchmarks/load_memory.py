"""Peak host memory of loading a single file, for files and nets of several number formats.

Writes a Stable Diffusion 1.x file of full size with random values (2.1 GB in 16 bits) into a temporary folder, loads it
in a process of its own for each target format, and compares how far that process's memory grew with the size of the
file's numbers in the target format: for int8, nf4 and fp8, in which the blocks of denoiser and text encoder are kept
while the rest is in fp16, with the size of all that is held. Needs 5 GB of disk and of memory for a while, and some
minutes; `--quantised` measures those alone, and leaves the other rows of the results as they are.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEYS = ROOT / "tests" / "fixtures" / "keys" / "sd1.single_file.json.gz"
RESULTS = Path(__file__).with_name("results") / "load_memory.json"
FORMATS = {
    "fp16": ("F16", "float16"),
    "bf16": ("BF16", "bfloat16"),
    "fp32": ("F32", "float32"),
    "fp8": ("F8_E4M3", "float8_e4m3fn"),
}
"""What people call a format: what safetensors and torch call it."""
CASES = [(stored, target) for stored in ("fp16", "bf16", "fp32") for target in ("fp16", "bf16", "fp32")] + [
    ("fp8", None)
]
"""Format of the file, format asked for; None: none is, so fp8 is read into bf16."""
QUANTISED = [("fp16", kept) for kept in ("int8", "nf4", "fp8")]
"""Format of the file, what its blocks are kept in."""
ALLOWED, ALLOWED_QUANTISED = 1.10, 1.05
"""Growth of memory as a part of the target's size, and of what is held in fewer bits."""
GB = 1e9


def write(path: Path, stored: str) -> None:
    """The file, a tensor at a time: normal numbers, small enough for fp8."""
    import torch

    spelling, name = FORMATS[stored]
    dtype, generator = getattr(torch, name), torch.Generator().manual_seed(0)
    table: dict[str, list[int]] = json.loads(gzip.decompress(KEYS.read_bytes()))
    entries: dict[str, Any] = {}
    at = 0
    for key, shape in table.items():
        size = math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": spelling, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for shape in table.values():
            values = torch.randn(math.prod(shape), generator=generator).mul_(0.05).to(dtype)
            file.write(values.view(torch.uint8).numpy().data)


def peak() -> int:
    """The most memory that this process had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> Mapping[str, int]:
    """Memory of this process now, in bytes: its own, and pages of files that are mapped."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    own, mapped = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return {"own": own, "mapped": mapped}


def measure(path: str, target: str | None, kept: str | None) -> Mapping[str, float]:
    """Load the file in this process, its blocks kept in fewer bits if that is asked for. All that loading imports is
    imported before."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    from sfumato import families
    from sfumato.families.detect import detect_file
    from sfumato.models import loading

    assert AutoencoderKL and CLIPTextModel and CLIPTokenizer and loading
    torch.set_num_threads(1)
    name = detect_file(path).family
    family, options = families.family(name), families.facts(name).options()
    loading.quantise_when_read(loading.outline(family, path, options), {"denoiser": "int8"})  # what that imports
    before = resident()
    start = sum(before.values())
    dtype = getattr(torch, FORMATS[target][1]) if target else None
    models = loading.outline(family, path, options, detect=detect_file)
    nets = dict.fromkeys(models.nets(), kept) if kept else {}
    loading.quantise_when_read(models, nets)
    loading.read_values(models, dtype=dtype)
    loaded, after = peak(), resident()
    own = [*models.nets().values(), models.vae]
    tensors = [t for net in own for t in (*net.parameters(), *net.buffers())]
    for t in tensors:  # every page once, without a copy
        t.reshape(-1).view(torch.uint8)[::1024].sum()
    numbers = sum(t.numel() for net in own for t in net.state_dict().values())
    held = sum(t.nbytes for t in tensors)
    return {
        "numbers": numbers,
        "held_gb": held / GB,
        "target_gb": (held if kept else numbers * (dtype or torch.bfloat16).itemsize) / GB,
        "baseline_gb": start / GB,
        "growth_gb": (loaded - start) / GB,
        "own_gb": (after["own"] - before["own"]) / GB,
        "mapped_gb": (after["mapped"] - before["mapped"]) / GB,
        "used_growth_gb": (peak() - start) / GB,
    }


def run(path: Path, target: str | None, kept: str | None) -> dict[str, Any]:
    """`measure` in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", str(path), target or "none", kept or "none"]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def rows(cases: Sequence[tuple[str, str | None, str | None]]) -> list[dict[str, Any]]:
    """Cases of (format of the file, format asked for, what blocks are kept in), one file after another."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        written = ""
        for stored, target, kept in cases:
            if written != stored:
                write(path, stored)
                written = stored
            found = {
                "file": stored,
                "file_gb": path.stat().st_size / GB,
                "target": kept or target or "bf16",
                "allowed": ALLOWED_QUANTISED if kept else ALLOWED,
                **run(path, target, kept),
            }
            found["ratio"] = found["growth_gb"] / found["target_gb"]
            found["used_ratio"] = found["used_growth_gb"] / found["target_gb"]
            made.append({name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()})
            print(table(made[-1:]), flush=True)
    return made


COLUMNS = (
    *("file", "file_gb", "target", "target_gb", "held_gb", "growth_gb", "ratio"),
    *("own_gb", "mapped_gb", "used_growth_gb", "used_ratio"),
)


def table(made: list[dict[str, Any]]) -> str:
    """Rows for a reader."""
    return "\n".join("".join(f"{row[name]:>{max(len(name), 6) + 2}}" for name in COLUMNS) for row in made)


def machine() -> dict[str, Any]:
    """Where it was measured."""
    import safetensors
    import torch

    return {
        "cores": os.cpu_count(),
        "kind": "CPU container" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def main() -> None:
    """Measure, print the table, write the results; ends with 1 where more memory was needed than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of the results (default: %(default)s)")
    parser.add_argument("--quantised", action="store_true", help="int8, nf4 and fp8 alone")
    parser.add_argument("--measure", nargs=3, metavar=("FILE", "FORMAT", "KEPT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        path, target, kept = (None if word == "none" else word for word in given.measure)
        print(json.dumps(measure(path, target, kept)))
        return
    print("".join(f"{name:>{max(len(name), 6) + 2}}" for name in COLUMNS))
    others = [(stored, target, None) for stored, target in CASES]
    made = rows([*([] if given.quantised else others), *((stored, stored, kept) for stored, kept in QUANTISED)])
    names = {(row["file"], row["target"]) for row in made}
    before = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.exists() else []
    kept_rows = [row for row in before if (row["file"], row["target"]) not in names]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({"machine": machine(), "rows": kept_rows + made}, indent=1) + "\n", encoding="utf-8"
    )
    if over := [row for row in made if max(row["ratio"], row["used_ratio"]) > row["allowed"]]:
        raise SystemExit(f"more than is allowed:\n{table(over)}")


if __name__ == "__main__":
    main()
