"""Which step to take: two LoRAs of line art on the model in the box, from 117 images and from 9 of them, and the loss
of both on 13 images that neither saw.

    python examples/emoji/validation.py    # about ten minutes on two cores

Writes into runs/validation: many.safetensors, few.safetensors and few-best.safetensors (the adapters), validation.png
(the losses, and what each adapter makes of the same prompts and seeds), validation.json (which step the monitor
recommends, and the measures of the quickstart).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import quickstart
from PIL.Image import Image
from quickstart import HERE, ROOT

OUT = ROOT / "runs" / "validation"
SETTINGS = {
    "max_train_steps": 160,
    "lr_scheduler": "constant_with_warmup",
    "validate_every_n_steps": 10,
    "output_dir": str(OUT),
}
COLOURS = {"many": "#2040c0", "few": "#d04020"}


def main() -> int:
    os.chdir(ROOT)
    from sfumato.cli.main import main as sfumato

    write_images()
    for name in COLOURS:
        if (OUT / f"{name}.safetensors").exists():
            continue
        words = ["train", "network", "--config", str(HERE / "quickstart.toml"), "--save_best"]
        named = {**SETTINGS, "output_name": name, "dataset_config": str(OUT / f"{name}.dataset.toml")}
        if code := sfumato([*words, *(f"--{key}={value}" for key, value in named.items())]):
            return code
    show()
    return 0


def write_images() -> None:
    """Folders `held_out` (every tenth image), `many` (the others) and `few` (9 of these), and a dataset file of each of
    the latter two with the first."""
    images = sorted((HERE / "lineart").glob("*.png"))
    rest = [image for i, image in enumerate(images) if i % 10]
    for name, members in (("held_out", images[::10]), ("many", rest), ("few", rest[::13])):
        (OUT / name).mkdir(parents=True, exist_ok=True)
        for image in members:
            for path in (image, image.with_suffix(".txt")):
                shutil.copy(path, OUT / name)
        text = (HERE / "dataset.toml").read_text(encoding="utf-8").replace('"lineart"', f'"{name}"')
        text += '\n[[datasets.subsets]]\nimage_dir = "held_out"\nvalidation_split = 1.0\n'
        (OUT / f"{name}.dataset.toml").write_text(text, encoding="utf-8")


def show() -> None:
    """Sample the held-out prompts with each adapter; write the picture and the measures."""
    from sfumato.train import monitor
    from sfumato.train.progress import console

    verdicts = {name: monitor.read(OUT / f"{name}.jsonl") for name in COLOURS}
    best, last = verdicts["few"].best.step, verdicts["few"].last.step
    adapters = {
        "without": None,
        f"117 images, step {verdicts['many'].best.step}": "many-best",
        f"9 images, step {best} (recommended)": "few-best",
        f"9 images, step {last}": "few",
    }
    samples = {title: sampled(adapter) for title, adapter in adapters.items()}
    measures = {title: measured(samples["without"], images) for title, images in samples.items()}
    found = {"verdicts": {name: said.facts() for name, said in verdicts.items()}, "samples": measures}
    (OUT / "validation.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw({name: monitor.points(OUT / f"{name}.jsonl") for name in COLOURS}, samples, measures)
    for name, said in verdicts.items():
        console.print(f"{name}: {said.text()}")
    for title, row in measures.items():
        console.print(f"{title}: {', '.join(f'{name} {value:.3f}' for name, value in row.items())}")
    console.print(f"look at {(OUT / 'validation.png').relative_to(ROOT)}")


def sampled(adapter: str | None) -> list[Image]:
    """What the model makes of the prompts, with an adapter or without."""
    from sfumato.sampling.prompts import read_prompts

    model = quickstart.pipeline()
    with model.adapted(OUT / f"{adapter}.safetensors") if adapter else nullcontext():
        return model.sample(read_prompts(HERE / "prompts.txt"))


def measured(before: Sequence[Image], after: Sequence[Image]) -> dict[str, float]:
    """How much colour is left, and how much of the shape."""
    kept = sum(map(quickstart.overlap, before, after)) / len(before)
    return {"colour": quickstart.saturation(list(after)), "shape kept": kept}


def draw(
    points: Mapping[str, Sequence[Any]], samples: Mapping[str, Sequence[Image]], measures: Mapping[str, Any]
) -> None:
    """The losses on the left, the samples on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    axes = left.subplots()
    for name, count in (("many", 117), ("few", 9)):
        steps = [p.step for p in points[name]]
        label = f"LoRA of {count} images: "
        axes.plot(steps, [p.held_out for p in points[name]], color=COLOURS[name], label=f"{label}held-out images")
        axes.plot(
            steps, [p.trained for p in points[name]], color=COLOURS[name], linestyle=":", label=f"{label}its own images"
        )
        best = min(points[name], key=lambda p: p.held_out)
        axes.plot([best.step], [best.held_out], "o", color=COLOURS[name], markersize=9, fillstyle="none")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss at eight fixed noise levels")
    axes.legend(frameon=False, fontsize=8)
    count = min(map(len, samples.values()))
    rows = right.subplots(len(samples), count, squeeze=False)
    for row, (title, images) in zip(rows, samples.items(), strict=True):
        for cell, image in zip(row, images, strict=False):
            cell.imshow(image)
            cell.set_axis_off()
            cell.set_title(" ", fontsize=9)  # its line
        said = f"{title}: shape kept {measures[title]['shape kept']:.0%}, colour {measures[title]['colour']:.2f}"
        row[0].text(0, 1.06, said, fontsize=9, transform=row[0].transAxes).set_in_layout(False)  # wider than its cell
    figure.savefig(OUT / "validation.png", format="png")


if __name__ == "__main__":
    sys.exit(main())
