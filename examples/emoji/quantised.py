"""The quickstart on a model whose weights are kept in fewer bits: trains the same LoRA, in batches of 4, with the model
in the box in fp32, int8, fp8 and nf4, and draws what each makes of the same prompts and seeds, with the model in fp32.

    python examples/emoji/quantised.py

Writes into runs/quantised: NAME.safetensors for each (one that is there is not trained again), quantised.png (a row for
each) and quantised.json: the mean difference of a pixel to the LoRA of fp32, as a share of the difference that the LoRA
makes, and the mean colour saturation.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image
from quickstart import HERE, ROOT, pipeline, saturation

OUT = ROOT / "runs" / "quantised"
STEPS = 200
RUNS: Mapping[str, Sequence[str]] = {
    "fp32": (),
    **{kind: ("--quantize", kind, "--quantize_text_encoders", kind) for kind in ("int8", "fp8", "nf4")},
}
"""Name -> what its run has besides the quickstart's settings."""


def main() -> int:
    os.chdir(ROOT)
    from sfumato.cli.main import main as sfumato

    OUT.mkdir(parents=True, exist_ok=True)
    data = (HERE / "dataset.toml").read_text(encoding="utf-8")
    data = data.replace('"lineart"', json.dumps(str(HERE / "lineart"))).replace("batch_size = 10", "batch_size = 4")
    (OUT / "dataset.toml").write_text(data, encoding="utf-8")
    config = ["train", "network", "--config", str(HERE / "quickstart.toml"), "--max_train_steps", str(STEPS)]
    config += ["--dataset_config", str(OUT / "dataset.toml"), "--cache_latents_to_disk", "--cache_dir", str(OUT)]
    for name, more in RUNS.items():
        own = ["--output_dir", str(OUT), "--output_name", name]
        if not file_of(name).exists() and (code := sfumato([*config, *own, *more])):
            return code
    show()
    return 0


def file_of(name: str) -> Path:
    return OUT / f"{name}.safetensors"


def show() -> None:
    """Sample the held-out prompts without and with each LoRA; write the grid and the measures."""
    from sfumato.sampling.image_files import grid
    from sfumato.sampling.prompts import read_prompts
    from sfumato.train.progress import console

    model, prompts = pipeline(), read_prompts(HERE / "prompts.txt")
    rows = {"no LoRA": model.sample(prompts)}
    for name in RUNS:
        with model.adapted(file_of(name)):
            rows[name] = model.sample(prompts)
    grid(list(rows.values()), list(rows), [p.prompt for p in prompts], enlarge=2).save(OUT / "quantised.png")
    effect = difference(rows["no LoRA"], rows["fp32"])
    found = {
        name: {"difference": difference(rows[name], rows["fp32"]) / effect, "saturation": saturation(rows[name])}
        for name in rows
    }
    (OUT / "quantised.json").write_text(json.dumps({"steps": STEPS, "rows": found}, indent=1) + "\n", encoding="utf-8")
    for name, each in found.items():
        console.print(f"{name}: {each['difference']:.3f} of the LoRA's effect, saturation {each['saturation']:.3f}")


def difference(some: list[Image], others: list[Image]) -> float:
    """Mean over all pixels of |a - b|, of 255."""
    pairs = zip(some, others, strict=True)
    return float(np.mean([np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]))


if __name__ == "__main__":
    sys.exit(main())
