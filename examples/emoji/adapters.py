"""The quickstart with every kind of adapter: trains each on the model in the box and draws what each makes of the same
prompts and seeds.

    python examples/emoji/adapters.py                 # all kinds: one to three minutes each on two cores
    python examples/emoji/adapters.py --kinds lora lokr

Writes into runs/adapters: NAME.safetensors for each kind (one that is there is not trained again), adapters.png (a row
for each), adapters.json (the measures of the quickstart, and the bytes of the file).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import quickstart
from quickstart import HERE, ROOT

OUT = ROOT / "runs" / "adapters"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "full": {"learning_rate": 2e-4},
    "ia3": {"learning_rate": 5e-2},
    "loha": {"network_dim": 8, "network_alpha": 8, "network_args": ["conv_dim=8", "conv_alpha=8"]},
    "lokr": {"network_args": ["conv_dim=8", "conv_alpha=8", "factor=8"]},
    "oft": {"learning_rate": 4e-3},
    "boft": {"learning_rate": 4e-3},
    "oftv2": {"learning_rate": 4e-3},
}
"""Kind -> what it is trained with where that differs from quickstart.toml; those without two factors want other
rates."""


def main() -> int:
    os.chdir(ROOT)
    from sfumato import adapters

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(adapters.kinds()), choices=adapters.kinds())
    args = parser.parse_args()
    for kind in args.kinds:
        if not file_of(kind).exists() and (code := train(kind)):
            return code
    show(args.kinds)
    return 0


def file_of(kind: str) -> Path:
    return OUT / f"{kind}.safetensors"


def train(kind: str) -> int:
    """Train one kind; the exit code."""
    from sfumato import adapters
    from sfumato.cli.main import main as sfumato

    settings = {"output_dir": str(OUT), "output_name": kind, "network_module": kind, **SETTINGS.get(kind, {})}
    if not adapters.kind(kind).has_rank:
        text = (HERE / "quickstart.toml").read_text(encoding="utf-8")
        config = OUT / f"{kind}-settings.toml"
        OUT.mkdir(parents=True, exist_ok=True)
        none = ("network_dim", "network_alpha", "network_args")
        lines = [line for line in text.splitlines() if not line.startswith(none)]
        config.write_text("\n".join(lines), encoding="utf-8")
    else:
        config = HERE / "quickstart.toml"
    words = ["train", "network", "--config", str(config)]
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return sfumato(words)


def show(kinds: Sequence[str]) -> None:
    """Sample the held-out prompts without and with each adapter; write the grid and the measures."""
    from sfumato import families
    from sfumato.config import Config, ModelConfig
    from sfumato.families.detect import detect_file
    from sfumato.sampling.image_files import grid
    from sfumato.sampling.prompts import read_prompts
    from sfumato.train.pipeline import Pipeline
    from sfumato.train.progress import console, print_table, progress

    model = str(HERE / "model.safetensors")
    options = families.facts(detect_file(model).family).options()
    pipeline = Pipeline.of(Config(model=ModelConfig(pretrained_model_name_or_path=model), family=options))
    prompts = read_prompts(HERE / "prompts.txt")
    with progress("sampling without an adapter") as advance:
        before = pipeline.sample(prompts, progress=advance)
    rows, facts = [before], {}
    for kind in kinds:
        with progress(f"sampling with {kind}") as advance, pipeline.adapted(file_of(kind)):
            rows.append(after := pipeline.sample(prompts, progress=advance))
        facts[kind] = {
            "fold": quickstart.saturation(before) / max(quickstart.saturation(after), 1e-9),
            "shape_kept": sum(map(quickstart.overlap, before, after)) / len(prompts),
            "bytes": file_of(kind).stat().st_size,
        }
    grid(rows, ["without", *facts], [p.prompt for p in prompts]).save(OUT / "adapters.png")
    (OUT / "adapters.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print_table(
        ("kind", "less colour", "shape kept", "KiB"),
        [
            (kind, f"{m['fold']:.1f} x", f"{m['shape_kept']:.0%}", f"{m['bytes'] / 1024:,.0f}")
            for kind, m in facts.items()
        ],
    )
    console.print(f"look at {(OUT / 'adapters.png').relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
