"""The quickstart: train a LoRA of a drawing style on the model in the box, then show and measure what it does.

Writes into runs/quickstart: lineart.safetensors (the adapter), before-after.png (same prompts and seeds, without and
with it), lineart-loss.png (the loss curve), effect.json (mean colour saturation without and with it, and how much of
the shape is kept).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ImageDraw, ImageFilter, ImageOps
from PIL.Image import Image, fromarray

if TYPE_CHECKING:
    from sfumato.train.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "examples" / "emoji"
OUT = ROOT / "runs" / "quickstart"
INK = 216
"""A pixel is ink if one of its channels is darker than this, of 255."""
GAP = 7


def main() -> int:
    os.chdir(ROOT)
    from sfumato.cli.main import main as sfumato

    if code := sfumato(["train", "network", "--config", str(HERE / "quickstart.toml")]):
        return code
    show(OUT / "lineart.safetensors")
    return 0


def show(adapter: Path) -> None:
    """Sample the held-out prompts without and with the adapter; write the grid and the measure."""
    from sfumato.sampling.image_files import grid
    from sfumato.sampling.prompts import read_prompts
    from sfumato.train.progress import console, progress

    model, prompts = pipeline(), read_prompts(HERE / "prompts.txt")
    with progress("sampling before and after") as advance:
        before = model.sample(prompts, progress=advance)
        with model.adapted(adapter):
            after = model.sample(prompts, progress=advance)
    titles = [p.prompt for p in prompts]
    grid([before, after], ["before", "after"], titles, enlarge=2).save(OUT / "before-after.png")
    effect = {"saturation_before": saturation(before), "saturation_after": saturation(after)}
    effect["fold"] = effect["saturation_before"] / max(effect["saturation_after"], 1e-9)
    effect["shape_kept"] = sum(map(overlap, before, after)) / len(prompts)
    effect["shape_by_chance"] = sum(map(overlap, before, after[1:] + after[:1])) / len(prompts)  # with another prompt's
    (OUT / "effect.json").write_text(json.dumps(effect, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"{len(prompts)} prompts that the LoRA never saw: mean colour saturation {effect['saturation_before']:.3f} "
        "without it, "
        f"{effect['saturation_after']:.3f} with it ({effect['fold']:.1f} times less); "
        f"silhouettes without and with it share {effect['shape_kept']:.0%} of their area "
        f"(those of different prompts {effect['shape_by_chance']:.0%})"
    )
    console.print(
        f"look at {(OUT / 'before-after.png').relative_to(ROOT)} and {(OUT / 'lineart-loss.png').relative_to(ROOT)}"
    )


def pipeline() -> Pipeline:
    """The model in the box, to sample from."""
    from sfumato import families
    from sfumato.config import Config, ModelConfig
    from sfumato.families.detect import detect_file
    from sfumato.train.pipeline import Pipeline

    model = str(HERE / "model.safetensors")
    options = families.facts(detect_file(model).family).options()
    return Pipeline.of(Config(model=ModelConfig(pretrained_model_name_or_path=model), family=options))


def saturation(images: list[Image]) -> float:
    """Mean over all pixels of (max - min) of red, green and blue, 0 to 1."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255  # (n, h, w, 3)
    return float((pixels.max(-1) - pixels.min(-1)).mean())


def overlap(one: Image, other: Image) -> float:
    """The area that both silhouettes cover, as a share of what either covers, 0 to 1."""
    a, b = silhouette(one), silhouette(other)
    return float((a & b).sum() / max((a | b).sum(), 1))


def silhouette(image: Image) -> np.ndarray:
    """Which pixels are ink or enclosed by ink; gaps of a line up to GAP - 1 px wide count as closed. (h, w), bool."""
    ink = fromarray((np.asarray(image).min(-1) < INK).astype(np.uint8))
    thick = ImageOps.expand(ink, border=GAP).filter(ImageFilter.MaxFilter(GAP))
    ImageDraw.floodfill(thick, (0, 0), 2)  # the white that is reached from outside
    inside = fromarray((np.asarray(thick) != 2).astype(np.uint8)).filter(ImageFilter.MinFilter(GAP))
    return np.asarray(inside)[GAP:-GAP, GAP:-GAP] == 1


if __name__ == "__main__":
    sys.exit(main())
