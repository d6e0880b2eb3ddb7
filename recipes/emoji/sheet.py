"""Draw a contact sheet: what the model in the box says to names that it was taught."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pictures import captions

import sfumato
from sfumato.config import LossConfig, NoiseConfig
from sfumato.sampling.image_files import grid
from sfumato.sampling.prompts import Prompt
from sfumato.sampling.sample import generate

NAMES = """
red apple, banana, strawberry, watermelon, pineapple, carrot, mushroom, hamburger, slice of pizza, birthday cake,
doughnut, beer mug,
cat face, dog face, panda face, pig face, frog face, penguin, owl, turtle, butterfly, ladybug, octopus, tropical fish,
red car, bus, bicycle, rocket, airplane, sailboat, helicopter, tractor, house, castle, tent, rainbow,
sunflower, rose, cactus, christmas tree, red heart, star, crown, balloon, guitar, soccer ball, camera, smiling face
"""
COLUMNS = 8
BATCH = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/emoji/model.safetensors")
    parser.add_argument("--out", type=Path, default=Path("docs/emoji-sheet.png"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1, help="of the first picture; each further one has the next")
    args = parser.parse_args()
    names = [name.strip() for name in NAMES.split(",")]
    unknown = set(names) - {caption for _, caption in captions()}
    if unknown:
        raise SystemExit(f"not in captions.txt: {', '.join(sorted(unknown))}")
    models = sfumato.load(args.model, dtype=torch.float32)
    models.vae.float()
    prompts = [
        Prompt(prompt=name, width=64, height=64, sample_steps=args.steps, scale=args.scale, seed=args.seed + i)
        for i, name in enumerate(names)
    ]
    process = models.process(NoiseConfig(), LossConfig())
    images = generate(models, prompts, process=process, sampler="ddim", batch_size=BATCH)
    # `grid` titles whole columns; here each picture has a name of its own, so each row is a grid.
    rows = [
        grid([images[i : i + COLUMNS]], column_titles=names[i : i + COLUMNS], enlarge=2)
        for i in range(0, len(names), COLUMNS)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid([[row] for row in rows]).save(args.out, optimize=True)
    print(f"{len(images)} pictures in {args.out}")


if __name__ == "__main__":
    main()
