"""What a run would write, compared with what it reads: nothing of the user's is overwritten, and every name can be
written.

Only paths that exist can be lost, so the folder of the results is searched for names that this run may write.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sfumato.config import Config, DatasetConfig, Method
from sfumato.data.folders import SUFFIXES
from sfumato.errors import UserError
from sfumato.formats.folders import irreplaceable
from sfumato.models.components import Checkpoint
from sfumato.train import checkpoints


@dataclass(slots=True)
class Inputs:
    """What a run reads that is on this machine."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    """(setting, file)."""
    folders: list[tuple[str, Path]] = field(default_factory=list)
    """(setting, folder) of models and tokenizers, in which nothing may be written."""
    images: list[tuple[Path, bool, tuple[str, ...]]] = field(default_factory=list)
    """(folder, whether with what is in its folders, endings of the files that are read in it)."""


def check(
    config: Config,
    method: Method,
    datasets: Sequence[DatasetConfig],
    source: Checkpoint | None,
    read: Sequence[Path] = (),
) -> None:
    """Errors: `UserError` with every output that would overwrite an input or a file of the user's, or cannot be
    written.

    `source`: the base model's files; None: they could not be opened. `read`: the config files that the settings came
    from.
    """
    folder = Path(config.output.output_dir)
    layout = source.layout if source else "single_file"
    inputs = _inputs(config, datasets, source, read)
    wrong = _folder_mistakes(folder)
    # A model's folder comes before those in it, so the first that fits is enough.
    if inside := next(((setting, path) for setting, path in inputs.folders if _inside(folder, path)), None):
        wrong.append(
            f"output_dir: {folder} is in the model that {inside[0]} names ({inside[1]}); choose a folder outside of it"
        )
    components = list(source.components) if source and method == "full" else []
    for path, is_folder in _existing(config, checkpoints.ending(config.output, method, layout), components):
        wrong += _collisions(path, is_folder, inputs)
    wrong += _not_folders(
        folder, (["sample"] if config.sample.sample_prompts else []) + (["logs"] if _logs_here(config) else [])
    )
    if wrong:
        raise UserError(*dict.fromkeys(wrong))


def check_folder(folder: Path) -> None:
    """Errors: `UserError` if files cannot be written into a folder."""
    if wrong := _folder_mistakes(folder):
        raise UserError(*wrong)


def check_samples(folder: Path) -> None:
    """Errors: `UserError` if sample images cannot be written below a folder."""
    if wrong := _folder_mistakes(folder) + _not_folders(folder, ["sample"]):
        raise UserError(*wrong)


def _not_folders(folder: Path, names: Sequence[str]) -> list[str]:
    """What is wrong with the folders that are to be in `folder`, or to be made there."""
    return [
        f"{folder / name}: a folder is to be written here, and this is a file; move it or choose another output_dir"
        for name in names
        if (folder / name).exists() and not (folder / name).is_dir()
    ]


def _inputs(
    config: Config, datasets: Sequence[DatasetConfig], source: Checkpoint | None, read: Sequence[Path]
) -> Inputs:
    model, network = config.model, config.network
    named: list[tuple[str, str | Path | None]] = [
        ("pretrained_model_name_or_path", source.path if source else model.pretrained_model_name_or_path),
        ("vae", model.vae),
        ("tokenizer", model.tokenizer),
        ("network_weights", network.network_weights),
        ("controlnet_model_name_or_path", config.control.controlnet_model_name_or_path),
        ("dataset_config", config.data.dataset_config),
        ("sample_prompts", config.sample.sample_prompts),
        *(("base_weights", path) for path in network.base_weights),
        ("weights", config.embedding.weights),
        *(("textual_inversion_embeddings", path) for path in config.embedding.textual_inversion_embeddings),
        *(("--config", path) for path in read),
        *(("metadata_file", subset.metadata_file) for dataset in datasets for subset in dataset.subsets),
    ]
    found = Inputs()
    for weights in source.components.values() if source else ():
        setting = weights.component.flag if weights.alone else "pretrained_model_name_or_path"
        named += [(setting, weights.where), *((setting, path) for path in weights.tensors.paths)]
    for setting, name in named:
        if name and (path := Path(name).expanduser()).exists():
            (found.folders if path.is_dir() else found.files).append((setting, path))
    for subset in (s for dataset in datasets for s in dataset.subsets):
        endings = (*SUFFIXES, subset.caption_extension)
        found.images += [
            (Path(f), subset.recursive, endings) for f in (subset.image_dir, subset.conditioning_data_dir) if f
        ]
    return found


def _folder_mistakes(folder: Path) -> list[str]:
    """What is wrong with the folder of the results."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        return [f"output_dir: {there} is a file, not a folder; choose another"]
    return [] if os.access(there, os.W_OK) else [f"output_dir: {there} cannot be written to; choose another folder"]


def _logs_here(config: Config) -> bool:
    return config.log.log_with in ("tensorboard", "all") and not config.log.logging_dir


def _existing(config: Config, suffix: str, components: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """(path, whether a folder is to stand there) of everything that the run may write and that is there already."""
    folder, name = Path(config.output.output_dir), config.output.output_name
    with suppress(OSError):
        for entry in sorted(os.listdir(folder)):
            # On disks that do not distinguish capitals, `Model.toml` is what `model.toml` is written over.
            rest = entry[len(name) :].lower()
            if entry[: len(name)].casefold() != name.casefold() or not os.path.lexists(folder / f"{name}{rest}"):
                continue
            is_folder = _written(config, rest, suffix, components)
            if is_folder is not None:
                yield folder / f"{name}{rest}", is_folder


def _written(config: Config, rest: str, suffix: str, components: Sequence[str]) -> bool | None:
    """Whether `NAME` + `rest` is written as a folder (True) or as a file (False), or not at all (None)."""
    if rest in (".toml", ".jsonl", "-loss.png"):
        return False
    beside = "|".join(re.escape(f"_{name}") for name in components)
    match = re.fullmatch(
        rf"(-(?P<epoch>\d{{6}})|-step\d{{8}}|(?P<best>-best))?(?P<beside>{beside})?(?P<kind>{re.escape(suffix)}|-state)",
        rest,
    )
    if not match or (match["beside"] and (match["kind"] == "-state" or not suffix)):
        return None
    if match["best"] and (match["kind"] == "-state" or not config.validation.save_best):
        return None
    output = config.output
    every = 1 if output.save_n_epoch_ratio else output.save_every_n_epochs
    if match["epoch"] and (not every or int(match["epoch"]) % every):
        return None  # not an epoch after which something is saved; after which step one is stopped is not known
    return match["kind"] == "-state" or not suffix


def _collisions(path: Path, is_folder: bool, inputs: Inputs) -> list[str]:
    """What would be lost, or cannot be, if something were written to a path that exists."""
    cure = "choose another output_name or output_dir"
    for setting, file in [*inputs.folders, *inputs.files]:
        if setting == "--config" and _own_text(path):
            continue  # the settings of an earlier run, which go on as those of this one
        if _same(path, file):
            return [f"output_name: the result {path} would overwrite what {setting} names; {cure}"]
        if is_folder and _inside(file, path):
            return [
                f"output_name: the result {path} would take the place of a folder that holds {file}, which {setting} "
                f"names; {cure}"
            ]
    for folder, recursive, endings in inputs.images:
        if is_folder and _inside(folder, path):
            return [
                f"output_name: the result {path} would take the place of a folder that holds images of the dataset; "
                f"{cure}"
            ]
        if path.suffix in endings and (_inside(path.parent, folder) if recursive else _same(path.parent, folder)):
            return [f"output_name: {path} would be written over a file of the dataset's folder {folder}; {cure}"]
    if is_folder:
        return [why] if (why := irreplaceable(path)) else []
    if path.is_dir():
        return [f"output_name: {path} is a folder, and a file is to be written there; {cure}"]
    if path.suffix in (".toml", ".jsonl") and not _own_text(path):
        what = "the resolved settings" if path.suffix == ".toml" else "the log"
        return [
            f"output_name: {what} would be written over {path}, which sfumato did not write; {cure}, or rename that "
            "file"
        ]
    return []


def _own_text(path: Path) -> bool:
    """Whether a settings file or a log is one of sfumato's own, or empty."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline(1 << 16)
        if not first.strip() or path.suffix == ".toml":
            return not first.strip() or first.startswith("# sfumato")
        return "step" in json.loads(first)
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file, by whatever name: links of both kinds, capitals, `..`."""
    try:
        return a.samefile(b)
    except OSError:
        return False


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder, or would be in it; links are followed."""
    real = path.resolve()
    return any(_same(p, folder) for p in (real, *real.parents) if p.exists())
