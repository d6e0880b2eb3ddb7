"""A slider: one LoRA that makes the model's pictures more colourful at strength 1, paler at -1, and goes on beyond.

    python examples/emoji/slider.py

The model draws 60 pictures itself; with more colour they are learnt at strength 1, with less at -1
(`network_multiplier` of two datasets), so that what both have in common is not learnt. Writes into runs/slider:
slider.safetensors, slider.png (the same prompts and seeds from -2 to 2), slider.json (mean colour saturation at each
strength, and how much of the shape is kept).
"""

from __future__ import annotations

import json
import os
import sys

from PIL import ImageEnhance
from quickstart import HERE, ROOT, overlap, pipeline, saturation

OUT = ROOT / "runs" / "slider"
COLOUR = {"colourful": (1.0, 1.8), "pale": (-1.0, 0.2)}
"""Folder -> `network_multiplier`, and how much of its colour a picture has there."""
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
SETTINGS = {
    "learning_rate": 1e-3,
    "max_train_steps": 100,
    "dataset_config": str(OUT / "dataset.toml"),
    "output_dir": str(OUT),
    "output_name": "slider",
}


def main() -> int:
    os.chdir(ROOT)
    from sfumato.cli.main import main as sfumato

    write_images()
    settings = (f"--{key}={value}" for key, value in SETTINGS.items())
    if code := sfumato(["train", "network", "--config", str(HERE / "quickstart.toml"), *settings]):
        return code
    show()
    return 0


def write_images() -> None:
    """What the model draws for 60 names, in both folders, and the dataset file."""
    from sfumato.sampling.prompts import Prompt
    from sfumato.train.progress import progress

    names = [path.read_text(encoding="utf-8").strip() for path in sorted((HERE / "lineart").glob("*.txt"))[:60]]
    asked = [Prompt(prompt=n, width=64, height=64, sample_steps=12, scale=2, seed=100 + i) for i, n in enumerate(names)]
    with progress("drawing pictures to learn from") as advance:
        drawn = pipeline().sample(asked, progress=advance)
    tables = ['[general]\ncaption_extension = ".txt"\ncaption_dropout_rate = 0.1\nresolution = 64\nbatch_size = 5\n']
    for folder, (strength, colour) in COLOUR.items():
        (OUT / folder).mkdir(parents=True, exist_ok=True)
        for i, (name, image) in enumerate(zip(names, drawn, strict=True)):
            ImageEnhance.Color(image).enhance(colour).save(OUT / folder / f"{i:02d}.png")
            (OUT / folder / f"{i:02d}.txt").write_text(name, encoding="utf-8")
        where = json.dumps(str(OUT / folder))
        tables.append(f"[[datasets]]\nnetwork_multiplier = {strength}\n\n[[datasets.subsets]]\nimage_dir = {where}\n")
    (OUT / "dataset.toml").write_text("\n".join(tables), encoding="utf-8")


def show() -> None:
    """Sample the held-out prompts at each strength; write the grid and the measures."""
    from sfumato.sampling.image_files import grid
    from sfumato.sampling.prompts import read_prompts
    from sfumato.train.progress import console

    model, prompts = pipeline(), read_prompts(HERE / "prompts.txt")
    rows = []
    with model.adapted(OUT / "slider.safetensors") as (network,):
        for strength in STRENGTHS:
            network.multiplier = strength
            rows.append(model.sample(prompts))
    plain = rows[STRENGTHS.index(0.0)]
    found = [
        {
            "strength": strength,
            "saturation": saturation(row),
            "shape_kept": sum(map(overlap, plain, row)) / len(row),
        }
        for strength, row in zip(STRENGTHS, rows, strict=True)
    ]
    grid(rows, [f"{s:+g}" for s in STRENGTHS], [p.prompt for p in prompts], enlarge=2).save(OUT / "slider.png")
    (OUT / "slider.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for each in found:
        console.print(
            f"at {each['strength']:+g}: colour saturation {each['saturation']:.3f}, {each['shape_kept']:.0%} of the "
            "shape as without it"
        )


if __name__ == "__main__":
    sys.exit(main())
