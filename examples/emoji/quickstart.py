"""The quickstart: train a LoRA of a drawing style on the model in the box, then show and measure what it does.

Writes into runs/quickstart: lineart.safetensors (the adapter), before-after.png (same prompts and seeds, without
and with it), lineart-loss.png (the loss curve), effect.json (mean colour saturation without and with it).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "examples" / "emoji"
OUT = ROOT / "runs" / "quickstart"


def main() -> int:
    os.chdir(ROOT)
    from sfumato.cli.main import main as sfumato

    if code := sfumato(["train", "network", "--config", str(HERE / "quickstart.toml")]):
        return code
    show(OUT / "lineart.safetensors")
    return 0


def show(adapter: Path) -> None:
    """Draw the held-out prompts without and with the adapter; write the grid and the measure."""
    from sfumato import families
    from sfumato.config import Config, ModelConfig
    from sfumato.families.detect import detect_file
    from sfumato.train.draw import Drawer
    from sfumato.train.picture import grid
    from sfumato.train.progress import console, telling
    from sfumato.train.prompts import read_prompts

    model = str(HERE / "model.safetensors")
    options = families.facts(detect_file(model).family).options()
    drawer = Drawer.of(Config(model=ModelConfig(pretrained_model_name_or_path=model), family=options))
    prompts = read_prompts(HERE / "prompts.txt")
    with telling("drawing before and after") as tell:
        before = drawer.draw(prompts, progress=tell)
        with drawer.adapted(adapter):
            after = drawer.draw(prompts, progress=tell)
    titles = [p.prompt for p in prompts]
    grid([before, after], ["before", "after"], titles, enlarge=2).save(OUT / "before-after.png")
    effect = {"saturation_before": saturation(before), "saturation_after": saturation(after)}
    effect["fold"] = effect["saturation_before"] / max(effect["saturation_after"], 1e-9)
    (OUT / "effect.json").write_text(json.dumps(effect, indent=1) + "\n")
    console.print(
        f"mean colour saturation of {len(prompts)} prompts that the LoRA never saw: "
        f"{effect['saturation_before']:.3f} without it, {effect['saturation_after']:.3f} with it ({effect['fold']:.1f} times less)"
    )
    console.print(f"look at {(OUT / 'before-after.png').relative_to(ROOT)} and {(OUT / 'lineart-loss.png').relative_to(ROOT)}")


def saturation(images: list) -> float:
    """Mean over all pixels of (max - min) of red, green and blue, 0 to 1."""
    import numpy as np

    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255  # (n, h, w, 3)
    return float((pixels.max(-1) - pixels.min(-1)).mean())


if __name__ == "__main__":
    sys.exit(main())
