"""A dry run: every check that needs no weights, and what the training would do, as tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sfumato import families
from sfumato.config import Config, DatasetConfig, Method
from sfumato.data.plan import Plan, make_plan
from sfumato.data.store import Index
from sfumato.families.detect import detect_file
from sfumato.train import keep
from sfumato.train.check import check
from sfumato.train.loop import Pace
from sfumato.train.progress import telling
from sfumato.train.trainables import caches_latents, caches_text

FOLDERS = ("dataset", "folder", "kind", "pictures", "repeats", "samples an epoch", "left out")
BUCKETS = ("dataset", "bucket", "pictures", "samples", "batches", "last batch", "cut away", "enlarged")


def show(config: Config, method: Method, datasets: tuple[DatasetConfig, ...]) -> None:
    """`sfumato plan`: print what a training would do. Errors: `UserError`, as the training itself would give before its first step."""
    console = Console(highlight=False)
    found = detect_file(config.model.pretrained_model_name_or_path)
    prompts, _ = check(config, method)
    latents = families.of(config.family).latents
    with telling("reading pictures") as tell:
        plan = make_plan(
            datasets, Index(), skip_unreadable=config.data.skip_unreadable, bodies=False,
            stride=latents.stride, multiple=latents.multiple, progress=tell,
        )  # fmt: skip
    # Asked of the launcher's environment alone: a dry run starts no processes and no device.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    pace = Pace.of(config, plan.batches_per_epoch, processes)
    console.print(f"{config.model.pretrained_model_name_or_path}: {found.family} {found.variant} {found.kind}, {found.dialect} names")
    _table(console, FOLDERS, plan.folder_rows())
    _table(console, BUCKETS, plan.bucket_rows())
    _tell_left_out(console, plan)
    console.print(plan.steps_line(config.train.gradient_accumulation_steps, processes))
    console.print(f"{pace.steps} steps in all, {pace.epochs} epochs")
    kept = [name for name, cached in (("latents", caches_latents(config)), ("text outputs", caches_text(config))) if cached]
    console.print(f"kept between steps: {' and '.join(kept) or 'nothing: pictures and captions are encoded in every step'}")
    _table(console, ("after", "files"), _results(config, pace, len(prompts)))


def _table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _tell_left_out(console: Console, plan: Plan) -> None:
    for note in plan.notes:
        console.print(note)
    for skip in plan.skipped:
        console.print(f"left out: {skip.path}: {skip.reason}")


def _results(config: Config, pace: Pace, prompts: int) -> list[tuple[str, str]]:
    """When which files are written."""
    output, sample = config.output, config.sample
    folder, rows = Path(output.output_dir), []
    state = f" and {keep.state_name('...')}" if output.save_state else ""
    if every := output.save_every_n_steps:
        rows.append((f"every {every} steps", f"{folder / keep.step_name(output.output_name, every)}{state}"))
    if every := keep.every_n_epochs(output, pace.epochs):
        rows.append((f"every {every} epochs", f"{folder / keep.epoch_name(output.output_name, every)}{state}"))
    for every, unit in ((sample.sample_every_n_steps, "steps"), (sample.sample_every_n_epochs, "epochs")):
        if every:
            rows.append((f"every {every} {unit}", f"{prompts} pictures in {folder / 'sample'}"))
    rows.append((f"step {pace.steps}", f"{folder / output.output_name}"))
    return rows
