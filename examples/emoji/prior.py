"""Prior preservation: two LoRAs of line art that a word in the caption is to call, one of which must not change what
the model draws without that word.

    python examples/emoji/prior.py

Both learn the quickstart's pictures under captions that begin with "sketch". The second sees each picture once more
under its plain caption, and has to give there what the model predicts without the LoRA (`custom_attributes`,
diff_output_preservation): no further pictures are needed. Writes into runs/prior: alone.safetensors,
preserved.safetensors, prior.png (the same prompts and seeds, with the word and without), prior.json (mean colour
saturation of each row).
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

from quickstart import HERE, ROOT, pipeline, saturation

OUT = ROOT / "runs" / "prior"
WORD = "sketch"
NAMES = ("alone", "preserved")


def main() -> int:
    os.chdir(ROOT)
    from sfumato.cli.main import main as sfumato

    OUT.mkdir(parents=True, exist_ok=True)
    images = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(HERE / 'lineart'))}\n"
    head = '[general]\ncaption_extension = ".txt"\n\n[[datasets]]\nresolution = 64\nbatch_size = 10\n\n'
    learnt = f'{head}{images}caption_prefix = "{WORD}"\n'
    kept = f"{learnt}\n{images}custom_attributes.diff_output_preservation = true\n"
    for name, text, steps in zip(NAMES, (learnt, kept), (150, 300), strict=True):  # as many of line art in both
        (OUT / f"{name}.dataset.toml").write_text(text, encoding="utf-8")
        settings = {
            "dataset_config": str(OUT / f"{name}.dataset.toml"),
            "max_train_steps": steps,
            "output_dir": str(OUT),
            "output_name": name,
        }
        words = (f"--{key}={value}" for key, value in settings.items())
        if code := sfumato(["train", "network", "--config", str(HERE / "quickstart.toml"), *words]):
            return code
    show()
    return 0


def show() -> None:
    """Sample the held-out prompts, plain and with the word, without and with each LoRA; write the grid and the
    measures."""
    from sfumato.sampling.image_files import grid
    from sfumato.sampling.prompts import read_prompts
    from sfumato.train.progress import console

    model, prompts = pipeline(), read_prompts(HERE / "prompts.txt")
    called = [replace(p, prompt=f"{WORD} {p.prompt}") for p in prompts]
    rows = {"no LoRA": model.sample(prompts)}
    for name in NAMES:
        with model.adapted(OUT / f"{name}.safetensors"):
            rows[f"{name}, {WORD}"] = model.sample(called)
            rows[name] = model.sample(prompts)
    grid(list(rows.values()), list(rows), [p.prompt for p in prompts], enlarge=2).save(OUT / "prior.png")
    found = {name: saturation(row) for name, row in rows.items()}
    (OUT / "prior.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        console.print(f"{name}: colour saturation {value:.3f}")


if __name__ == "__main__":
    sys.exit(main())
