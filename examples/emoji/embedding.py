"""A new word: learns the vectors of a word from eight pictures of a symbol that no emoji is, and draws it. The model
itself does not change.

    python examples/emoji/embedding.py

Writes into runs/embedding: symbol.safetensors (the word, 8 vectors), embedding.png (the pictures, and what the model
draws from the same seeds for what the word began as, and for the word), embedding.json (the mean difference of a pixel
to the nearest picture, as a share of black to white, before and after).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import ImageDraw
from PIL.Image import Image, Resampling, new
from quickstart import HERE, ROOT

OUT = ROOT / "runs" / "embedding"
WORD, START, VECTORS = "symbol", "red heart", 8
SIZE, FINE = 64, 4
SEEDS = range(8)


def main() -> int:
    os.chdir(ROOT)
    from sfumato.cli.main import main as sfumato

    pictures = [symbol(i) for i in range(8)]
    folder = OUT / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
    (OUT / "dataset.toml").write_text(
        f"[[datasets]]\nresolution = {SIZE}\nbatch_size = 8\n\n[[datasets.subsets]]\nimage_dir = "
        f'{json.dumps(str(folder))}\nclass_tokens = "{WORD}"\n',
        encoding="utf-8",
    )
    command = f"""
        train embedding --pretrained_model_name_or_path {HERE / "model.safetensors"}
        --dataset_config {OUT / "dataset.toml"} --cache_latents --debiased_estimation_loss --seed 1
        --token_string {WORD} --num_vectors_per_token {VECTORS} --learning_rate 2e-2 --lr_scheduler cosine
        --max_train_steps 250 --output_dir {OUT} --output_name {WORD}
    """
    if code := sfumato([*command.split(), "--init_word", START]):
        return code
    show(pictures)
    return 0


def symbol(number: int) -> Image:
    """A red diamond with a white disc on it, each time in another place and size."""
    chance = np.random.default_rng(number)
    side = SIZE * FINE
    image = new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    x, y = side / 2 + chance.uniform(-0.03, 0.03, 2) * side
    r, inner = side * chance.uniform(0.41, 0.45), side * 0.15
    draw.polygon([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], fill=(225, 50, 40))
    draw.ellipse([x - inner, y - inner, x + inner, y + inner], fill="white")
    return image.resize((SIZE, SIZE), Resampling.LANCZOS)


def show(pictures: Sequence[Image]) -> None:
    """Sample what the word begins as, and the word; write the grid and the measure."""
    from sfumato import families
    from sfumato.config import Config, EmbeddingConfig, ModelConfig
    from sfumato.families.detect import detect_file
    from sfumato.sampling.image_files import grid
    from sfumato.sampling.prompts import Prompt
    from sfumato.train.pipeline import Pipeline
    from sfumato.train.progress import console

    model = str(HERE / "model.safetensors")
    pipeline = Pipeline.of(
        Config(
            model=ModelConfig(pretrained_model_name_or_path=model),
            embedding=EmbeddingConfig(textual_inversion_embeddings=(str(OUT / f"{WORD}.safetensors"),)),
            family=families.facts(detect_file(model).family).options(),
        )
    )

    def drawn(text: str) -> list[Image]:
        one = Prompt(prompt=text, width=SIZE, height=SIZE, sample_steps=20, scale=2.0)
        return pipeline.sample([replace(one, seed=seed) for seed in SEEDS])

    before, after = drawn(START), drawn(WORD)
    rows = [list(pictures), before, after]
    names = ["learnt from", f"before: {START}", f"after: {WORD}"]
    grid(rows, names, [f"seed {seed}" for seed in SEEDS], enlarge=2).save(OUT / "embedding.png")
    found = {"before": difference(before, pictures), "after": difference(after, pictures)}
    found |= {"among pictures": difference(pictures[:4], pictures[4:])}
    (OUT / "embedding.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"a pixel differs from the nearest picture by {found['before']:.3f} before and {found['after']:.3f} after the "
        f"word is learnt (pictures from each other by {found['among pictures']:.3f}); look at "
        f"{(OUT / 'embedding.png').relative_to(ROOT)}"
    )


def difference(images: Sequence[Image], pictures: Sequence[Image]) -> float:
    """Mean over all pixels of |a - b| to the nearest picture, 0 to 1."""
    a, b = (np.stack([np.asarray(image, np.float32) / 255 for image in each]) for each in (images, pictures))
    return float(np.abs(a[:, None] - b[None]).mean((2, 3, 4)).min(1).mean())


if __name__ == "__main__":
    sys.exit(main())
