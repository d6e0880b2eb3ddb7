"""Peak host memory of a run up to its first step: caches filled, prompts encoded, the denoiser read.

Writes a Stable Diffusion XL file of full size with a hole where the values would be (no room on the disk), and prepares
the training of a LoRA on the CPU in bf16, two images of 64 pixels with their latents and text outputs cached, in a
process of its own; takes how far that process's memory grew over what it had after its imports. `--before` names a
checkout to compare with. Needs 12 GB of memory, and about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from encode_memory import Own, forget_peak, peak
from load_memory import GB, ROOT, machine, resident

sys.path.insert(0, str(ROOT / "tests"))
KEYS = ROOT / "tests" / "fixtures" / "keys" / "sdxl.single_file.json.gz"
RESULTS = Path(__file__).with_name("results") / "turns_memory.json"


def write(folder: Path) -> None:
    """The model, and two images with captions."""
    from PIL import Image
    from sparse import sparse

    sparse(folder / "model.safetensors", json.loads(gzip.decompress(KEYS.read_bytes())), "F16")
    (folder / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 9, 9)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(f"picture {i}", encoding="utf-8")


def measure(folder: Path) -> dict[str, float]:
    """Prepare the run in this process. All that is imported for it is imported before."""
    import diffusers
    import torch
    import transformers
    from training import config

    from sfumato import families
    from sfumato.config import DatasetConfig, SubsetConfig
    from sfumato.train import dist, run

    assert transformers.CLIPTextModelWithProjection and diffusers.AutoencoderKL and families.family("sdxl")
    assert (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()
    given = config(
        pretrained_model_name_or_path=str(folder / "model.safetensors"), output_dir=str(folder / "out"),
        output_name="out", mixed_precision="bf16", max_train_steps=1, network_dim=4, network_train_unet_only=True,
        cache_latents=True, cache_text_encoder_outputs=True, family=families.facts("sdxl").options(),
    )  # fmt: skip
    data = DatasetConfig(subsets=(SubsetConfig(image_dir=str(folder / "images")),), resolution=(64, 64), batch_size=2)
    forget_peak()
    before, own, begun = resident(), Own(), time.monotonic()
    made = run.prepare(given, "network", (data,), dist.World(0, 1, torch.device("cpu")), 0.0)
    after = resident()
    assert made.log is not None
    with made.log:
        pass
    return {
        "baseline_gb": sum(before.values()) / GB,
        "growth_gb": (peak() - sum(before.values())) / GB,
        "own_gb": (own.stop() - before["own"]) / GB,
        "left_gb": (sum(after.values()) - sum(before.values())) / GB,
        "seconds": time.monotonic() - begun,
    }


def run_in(checkout: Path, folder: Path) -> dict[str, Any]:
    """`measure` in a fresh process, with the package of a checkout."""
    paths = [str(checkout), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, __file__, "--measure", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of the results (default: %(default)s)")
    parser.add_argument("--before", type=Path, help="another checkout of sfumato, to compare with")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    facts: dict[str, Any] = {"machine": machine()}
    for name, checkout in {"before": given.before, "now": ROOT}.items():
        if checkout:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder))
                facts[name] = run_in(checkout.resolve(), Path(folder))
                print(name, facts[name], flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
