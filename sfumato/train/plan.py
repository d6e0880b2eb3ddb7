"""A dry run: every check that a training makes before its first step, and what it would do, as tables or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.config import FOLLOWING, Config, DatasetConfig, Method
from sfumato.data.plan import Plan
from sfumato.families.detect import detect_file
from sfumato.train import checkpoints, dist, fit, lock, resume
from sfumato.train.caching import Data, open_data, warn_of_long_captions
from sfumato.train.check import Checked, Trained, check, check_length
from sfumato.train.devices import quantised
from sfumato.train.loop import StepBudget
from sfumato.train.progress import answers, print_table
from sfumato.train.trainables import caches_latents, caches_text

TRAINED = ("trained", "layers", "numbers", "MiB in fp32", "learning rate")
ADAPTED = ("trained", "adapters of rank", "layers by named set")
FOLDERS = ("dataset", "folder", "kind", "images", "repeats", "samples an epoch", "left out")
BUCKETS = ("dataset", "bucket", "images", "samples", "batches", "last batch", "cut away", "enlarged")
QUANTISED = ("frozen", "kept in", "layers", "MiB", "MiB else")
RESULTS = ("after", "files")


def show(
    config: Config,
    method: Method,
    datasets: tuple[DatasetConfig, ...],
    read: Sequence[Path] = (),
    given: Collection[str] = (),
) -> None:
    """`sfumato plan`: print what a training would do. `given`: settings that the user set. Errors: `UserError`, as the
    training itself would give before its first step."""
    config = resume.resolve_auto(config)
    checked = _checked(config, method, datasets, read)
    data = open_data(config, datasets, dist.outside(), checked.models, answers.print, control=method in FOLLOWING)
    warn_of_long_captions(config, data, checked.models, answers.print)
    budget = _budget(config, data)
    for note in _notes(config, checked, data, budget):
        answers.print(note)
    answers.print(_model(config))
    print_table(TRAINED, [_trained_row(each) for each in checked.trained])
    if method == "network":
        print_table(ADAPTED, [(each.component, _counts(each.ranks), _counts(each.sets)) for each in checked.trained])
    if rows := _quantised(config, method, checked):
        print_table(QUANTISED, rows)
    print_table(FOLDERS, folder_rows(data.plan))
    print_table(BUCKETS, bucket_rows(data.plan))
    answers.print(steps_line(data.plan, budget))
    answers.print(budget.text())
    answers.print(
        f"cached: {' and '.join(_cached(config)) or 'nothing: images and captions are encoded in every step'}"
    )
    if found := fit.fitted(config, method, checked.plan, data.plan, given, card=True):
        fit.show(found)
    print_table(RESULTS, _results(config, budget, checked, data.evaluation))
    for each in checked.loads_in:
        answers.print(each.text())
    if other := lock.taken(config):
        answers.print(other)


def facts(
    config: Config,
    method: Method,
    datasets: tuple[DatasetConfig, ...],
    read: Sequence[Path] = (),
    given: Collection[str] = (),
) -> dict[str, Any]:
    """`sfumato plan --json`: the same, for scripts. Errors: as `show`."""
    config, notes = resume.resolve_auto(config), list[str]()
    checked = _checked(config, method, datasets, read)
    data = open_data(config, datasets, dist.outside(), checked.models, notes.append, control=method in FOLLOWING)
    warn_of_long_captions(config, data, checked.models, notes.append)
    budget = _budget(config, data)
    found = fit.fitted(config, method, checked.plan, data.plan, given, card=True)
    return {
        "model": asdict(detect_file(config.model.pretrained_model_name_or_path)),
        "trained": [asdict(each) for each in checked.trained],
        "quantised": [dict(zip(QUANTISED, row, strict=True)) for row in _quantised(config, method, checked)],
        "folders": [dict(zip(FOLDERS, row, strict=True)) for row in folder_rows(data.plan)],
        "buckets": [dict(zip(BUCKETS, row, strict=True)) for row in bucket_rows(data.plan)],
        "notes": [*notes, *_notes(config, checked, data, budget)],
        "batches_per_epoch": budget.batches,
        "steps_per_epoch": budget.steps_per_epoch,
        "steps": budget.steps,
        "first_step": budget.first,
        "epochs": budget.epochs,
        "kept": _cached(config),
        "another_run": lock.taken(config),
        "results": [dict(zip(RESULTS, row, strict=True)) for row in _results(config, budget, checked, data.evaluation)],
        "loads_in": [asdict(each) for each in checked.loads_in],
        "memory": fit.facts(found) if found else None,
    }


def folder_rows(plan: Plan) -> list[tuple[str | int, ...]]:
    """One row per folder, in the columns of `FOLDERS`."""
    rows: list[tuple[str | int, ...]] = []
    folders, left = plan.folders(), Counter((skip.dataset, skip.subset) for skip in plan.skipped)
    held = Counter((item.dataset, item.image.subset) for item in plan.held_out)
    for d, dataset in enumerate(plan.datasets):
        for s, subset in enumerate(dataset.subsets):
            items = folders[d, s]
            samples = sum(item.repeats for item in items)
            counts = sorted({item.repeats for item in items}) or [subset.num_repeats]
            repeats = " or ".join(str(n) for n in counts)
            kind = "preserved" if subset.preserved else "regularisation" if subset.is_reg else "training"
            kind += f" at strength {dataset.network_multiplier:g}" if dataset.network_multiplier != 1 else ""
            if items or not held[d, s]:
                rows.append((d + 1, subset.source, kind, len(items), repeats, samples, left[d, s]))
            if held[d, s]:
                rows.append((d + 1, subset.source, "held out", held[d, s], 0, 0, 0 if items else left[d, s]))
    return rows


def bucket_rows(plan: Plan) -> list[tuple[str | int, ...]]:
    """One row per bucket, in the columns of `BUCKETS`."""
    rows: list[tuple[str | int, ...]] = []
    for (dataset, (width, height)), members in plan.buckets().items():
        items, size = [plan.items[i] for i in members], plan.datasets[dataset].batch_size
        samples = sum(item.repeats for item in items)
        cut = sum(1 - width * height / (p.resized[0] * p.resized[1]) for p in (i.placement for i in items)) / len(items)
        grown = sum(item.placement.resized[0] > item.image.width for item in items)
        last = samples % size or size
        bucket = f"{width}x{height}"
        rows.append((dataset + 1, bucket, len(items), samples, -(-samples // size), last, f"{cut:.1%}", grown))
    return rows


def steps_line(plan: Plan, budget: StepBudget) -> str:
    """The sum from images to the steps of an epoch, in words."""
    images = f"{sum(not item.image.is_reg for item in plan.items)} images x repeats = {plan.train_samples} samples"
    if plan.reg_samples:
        regs = sum(item.image.is_reg for item in plan.items)
        images += f", and {regs} regularisation images x repeats = {plan.reg_samples} samples"
    sizes = "/".join(str(dataset.batch_size) for dataset in plan.datasets)
    return (
        f"{images}; in batches of {sizes}, cut within each bucket: {budget.batches} batches; "
        f"/ ({budget.accumulation} accumulated x {budget.processes} processes) = {budget.steps_per_epoch} steps "
        "an epoch"
    )


def _checked(config: Config, method: Method, datasets: tuple[DatasetConfig, ...], read: Sequence[Path]) -> Checked:
    """As `check`; makes the nets, too, that a training needs only where their outputs are not cached."""
    checked = check(config, method, datasets, read)
    checked.models.make(checked.models.source.components)
    return checked


def _notes(config: Config, checked: Checked, data: Data, budget: StepBudget) -> list[str]:
    """What a user should know of the settings, their length, and what a state that is resumed has otherwise."""
    changed = resume.planned(config, data.plan, budget.steps_per_epoch, budget.steps)
    return [*checked.notes, *check_length(config, budget.steps), *changed]


def _budget(config: Config, data: Data) -> StepBudget:
    # Asked of the launcher's environment alone: a dry run starts no processes and no device.
    return StepBudget.of(config, data.plan.batches_per_epoch, dist.outside().size)


def _model(config: Config) -> str:
    found = detect_file(config.model.pretrained_model_name_or_path)
    return (
        f"{config.model.pretrained_model_name_or_path}: {found.family} {found.variant} {found.kind}, {found.dialect} "
        "names"
    )


def _trained_row(each: Trained) -> tuple[str, ...]:
    rates = " to ".join(f"{rate:g}" for rate in sorted({min(each.rates), max(each.rates)})) if each.rates else ""
    return each.component, f"{each.layers:,}", f"{each.numbers:,}", f"{each.numbers * 4 / 2**20:,.1f}", rates


def _quantised(config: Config, method: Method, checked: Checked) -> list[tuple[str | int, ...]]:
    """What is kept in fewer bits; of `auto` without values the most that it may be."""
    found = quantised(config, checked.models, method)
    return [
        (name, row.format, row.layers, f"{row.nbytes / 2**20:,.1f}", f"{row.before / 2**20:,.1f}")
        for name, rows in found.items()
        for row in rows
    ]


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in found.items())


def _cached(config: Config) -> list[str]:
    return [
        name for name, cached in (("latents", caches_latents(config)), ("text outputs", caches_text(config))) if cached
    ]


def _results(config: Config, budget: StepBudget, checked: Checked, evaluation: Plan | None) -> list[tuple[str, str]]:
    """When which files are written."""
    output, sample, end = config.output, config.sample, checked.suffix
    folder, rows = Path(output.output_dir), []
    state = f" and {checkpoints.state_name('...')}" if output.save_state else ""
    if every := output.save_every_n_steps:
        rows.append(
            (f"every {every} steps", f"{folder / checkpoints.step_name(output.output_name, every)}{end}{state}")
        )
    if every := checkpoints.every_n_epochs(output, budget.epochs):
        rows.append(
            (f"every {every} epochs", f"{folder / checkpoints.epoch_name(output.output_name, every)}{end}{state}")
        )
    for every, unit in ((sample.sample_every_n_steps, "steps"), (sample.sample_every_n_epochs, "epochs")):
        if every:
            rows.append((f"every {every} {unit}", f"{len(checked.prompts)} images in {folder / 'sample'}"))
    if evaluation:
        v, held = config.validation, len(evaluation.held_out)
        steps = f"every {v.validate_every_n_steps} steps" if v.validate_every_n_steps else ""
        epochs = f"every {v.validate_every_n_epochs or 1} epochs" if v.validate_every_n_epochs or not steps else ""
        when = ", ".join(filter(None, ("the start", steps, epochs, "the end")))
        rows.append((when, f"the loss of {held} held-out images and {len(evaluation.items) - held} trained ones"))
        if v.save_best:
            rows.append(("the best of these", f"{folder / checkpoints.best_name(output.output_name)}{end}"))
    rows.append((f"step {budget.steps}", f"{folder / output.output_name}{end}"))
    return rows
