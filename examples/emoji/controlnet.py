"""A ControlNet that follows an outline, on the model in the box: minutes on two cores.

The model itself draws the pictures that the ControlNet learns from. They are turned, stretched and moved, which the
model never draws and no caption says: the outlines say it. Then it draws names that were not among them in outlines of
theirs.

Writes into runs/controlnet: pictures/ and outlines/ (what it learns from), outline.safetensors (the ControlNet),
controlnet.png (the same prompts and seeds without it and in three outlines each), controlnet.json (how much of the
outlined shape is filled, without it and with it).
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from quickstart import HERE, ROOT, pipeline, silhouette

OUT = ROOT / "runs" / "controlnet"
SIDE = 64
EACH = 2
"""Pictures of each name, and times that each of them is moved."""
TRAINING = {
    "pretrained_model_name_or_path": HERE / "model.safetensors",
    "dataset_config": OUT / "dataset.toml",
    "output_dir": OUT,
    "output_name": "outline",
    "learning_rate": 5e-4,
    "control_net_lr": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "max_train_steps": 450,
    "seed": 1,
}
DATASET = """
[general]
caption_extension = ".txt"
caption_dropout_rate = 0.3 # what the outline says is learnt the better without a caption
flip_aug = true

[[datasets]]
resolution = 64
batch_size = 12
enable_bucket = false

[[datasets.subsets]]
image_dir = "pictures"
conditioning_data_dir = "outlines"
"""
MOVES = {"turned": (50, 0.9, 0.9, 0, 0), "narrow": (0, 0.5, 1.0, 8, 0), "flat": (-10, 1.05, 0.5, 0, 10)}
"""What is shown -> degrees, width and height of before, pixels to the right and down."""


def main() -> int:
    os.chdir(ROOT)
    from sfumato.cli.main import main as sfumato

    if not (OUT / "dataset.toml").exists():
        draw_pictures()
    words = ["train", "controlnet", "--cache_latents", "--cache_text_encoder_outputs", "--debiased_estimation_loss"]
    for name, value in TRAINING.items():
        words += [f"--{name}", str(value)]
    if not (OUT / "outline.safetensors").exists() and (code := sfumato(words)):
        return code
    show()
    return 0


def draw_pictures() -> None:
    """What the ControlNet learns from."""
    from sfumato.sampling.prompts import Prompt
    from sfumato.train.progress import progress

    names = [path.read_text(encoding="utf-8").strip() for path in sorted((HERE / "lineart").glob("*.txt"))]
    prompts = [
        Prompt(prompt=name, width=SIDE, height=SIDE, sample_steps=12, scale=2.0, seed=1000 * turn + i)
        for turn in range(EACH)
        for i, name in enumerate(names)
    ]
    with progress("drawing pictures to learn from") as advance:
        pictures, rng = pipeline().sample(prompts, batch_size=26, progress=advance), random.Random(1)
    for folder in ("pictures", "outlines"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(prompts * EACH):
        sides = rng.uniform(0.45, 1.0), rng.uniform(0.45, 1.0)
        picture = moved(
            pictures[i % len(prompts)],
            rng.uniform(-60, 60),
            *sides,
            *(rng.uniform(-18, 18) * (1 - side) for side in sides),
        )
        picture.save(OUT / "pictures" / f"{i:03d}.png")
        (OUT / "pictures" / f"{i:03d}.txt").write_text(prompt.prompt, encoding="utf-8")
        outline(silhouette(picture)).save(OUT / "outlines" / f"{i:03d}.png")
    (OUT / "dataset.toml").write_text(DATASET, encoding="utf-8")


def moved(picture: Image.Image, degrees: float, width: float, height: float, right: float, down: float) -> Image.Image:
    """A picture turned about its middle, then made so wide and high, then moved by so many pixels."""
    size = max(1, round(SIDE * width)), max(1, round(SIDE * height))
    part = picture.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white").resize(size, Image.Resampling.LANCZOS)
    whole = Image.new("RGB", (SIDE, SIDE), "white")
    whole.paste(part, (round((SIDE - size[0]) / 2 + right), round((SIDE - size[1]) / 2 + down)))
    return whole


def outline(shape: np.ndarray) -> Image.Image:
    """The line around a shape (h, w), white on black."""
    filled = ImageOps.expand(Image.fromarray(shape.astype(np.uint8) * 255), border=2)
    wide, thin = (np.asarray(filled.filter(kind(3))) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    return Image.fromarray(wide & ~thin).crop((2, 2, SIDE + 2, SIDE + 2))


def show() -> None:
    """Draw the held-out prompts without the ControlNet and in outlines of theirs; write the picture and the measure."""
    from sfumato.models.controlled import follow_by
    from sfumato.sampling.image_files import grid
    from sfumato.sampling.prompts import read_prompts
    from sfumato.train.progress import console

    model, prompts = pipeline(), read_prompts(HERE / "prompts.txt")
    alone = model.sample(prompts)
    follow_by(model.models, str(OUT / "outline.safetensors"))
    rows, titles, before, after = [alone], ["alone"], [], []
    for name, move in MOVES.items():
        shapes = [silhouette(moved(picture, *move)) for picture in alone]
        followed = []
        for i, (prompt, shape) in enumerate(zip(prompts, shapes, strict=True)):
            outline(shape).save(OUT / f"{name}-{i}.png")
            followed.append(replace(prompt, controlnet_image=str(OUT / f"{name}-{i}.png")))
        drawn = model.sample(followed)
        rows += [[outline(shape).convert("RGB") for shape in shapes], drawn]
        titles += [name, ""]
        before += [filled(picture, shape) for picture, shape in zip(alone, shapes, strict=True)]
        after += [filled(picture, shape) for picture, shape in zip(drawn, shapes, strict=True)]
    grid(rows, titles, [p.prompt for p in prompts], enlarge=2).save(OUT / "controlnet.png")
    without, with_it = float(np.mean(before)), float(np.mean(after))
    facts = {"overlap_without": without, "overlap_with": with_it}
    (OUT / "controlnet.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"{len(prompts)} prompts that the ControlNet never saw, each in {len(MOVES)} outlines: silhouettes and "
        f"outlined shapes share {without:.0%} of their area without it, {with_it:.0%} with it"
    )
    console.print(f"look at {(OUT / 'controlnet.png').relative_to(ROOT)}")


def filled(picture: Image.Image, shape: np.ndarray) -> float:
    """The area that the silhouette of a picture and a shape share, of what either covers, 0 to 1."""
    drawn = silhouette(picture)
    return float((drawn & shape).sum() / max((drawn | shape).sum(), 1))


if __name__ == "__main__":
    sys.exit(main())
