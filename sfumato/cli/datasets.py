"""Dataset files (TOML or JSON) and kohya's folders of folders -> `DatasetConfig`s; subset -> dataset -> [general] ->
flag."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from sfumato.cli import options, paths, rules, toml, values
from sfumato.cli.report import Given, Report
from sfumato.config import FOLLOWING, DatasetConfig, Settings, SubsetConfig, ValidationConfig
from sfumato.config.data import ONLY_REGULARISATION, PRESERVED, CaptionOptions, ImageOptions
from sfumato.config.relations import caches_text, follows_or_masks
from sfumato.data import folders
from sfumato.errors import UserError, nearest
from sfumato.formats.paths import trouble

FOLDER = re.compile(r"(\d+)_(.*)")
Found = dict[str, Given]
Value = Callable[[str], Any]

_SHARED = {f.name for record in (CaptionOptions, ImageOptions) for f in fields(record)}
_SHARED |= {"class_tokens", "custom_attributes"}
_SUBSET = {f.name for f in fields(SubsetConfig)}
_DATASET = ({f.name for f in fields(DatasetConfig)} - {"subsets"}) | _SHARED
_FLAGS = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
"""Setting of a dataset file -> the flag that it falls back to, where the names differ."""

SOURCES = ("dataset_config", "in_json", "dataset_class", "train_data_dir")
"""The settings that say which images there are; the first that is set counts."""
INERT = {
    "cache_info": "sizes and captions are read from the files' headers, quickly, and remembered",
}


def read(settings: Settings, given: Mapping[str, Given], report: Report) -> tuple[DatasetConfig, ...]:
    """The datasets that the settings name, checked; what is wrong goes to the report.

    `settings`: what the files fall back to; `given`: what a user set.
    """
    if not follows_or_masks(settings):  # which is reported with the other settings that do nothing
        settings = replace(settings, conditioning_data_dir=None)
    source = next((given[name] for name in SOURCES if name in given), None)
    lenient = source is not None and source.lenient
    if settings.dataset_config:
        tables = from_file(paths.expanded(settings.dataset_config), report, lenient=lenient)
    else:
        tables = from_folders(settings, given, report)
    used: dict[str, list[Any]] = {}
    found = [_dataset(table, subsets, settings, used, report) for table, subsets in tables]
    left_out: list[str] = []
    made = tuple(d for d in (replace(d, subsets=_acting(d.subsets, lenient, left_out)) for d in found) if d.subsets)
    for note in left_out:
        report.note(note)
    if lenient and found and not made and not report.errors:
        report.error(
            f"{source}: no folder of images is left to train on:" + "".join(f"\n  {note}" for note in left_out)
        )
    if made:
        _unused_flags(settings, given, used, report)
        check(made, settings, given, report)
    return made


# --- dataset files --------------------------------------------------------------------------------

Tables = list[tuple[Found, list[Found]]]
"""Of each dataset its own settings, [general]'s below them, and those of each of its subsets."""


def from_file(path: Path, report: Report, *, lenient: bool = False) -> Tables:
    """The settings of a dataset file, each with its line and of the right type. `lenient`: it was made for kohya's
    scripts."""
    if not os.path.isfile(path):
        return []  # reported with the other paths
    try:
        content, lines = toml.read(path)
    except UserError as e:
        report.errors += e.messages
        return []

    def table(at: toml.Path_, content: Any, known: set[str]) -> Found:
        return _table(path, at, content, lines, known, report, lenient)

    if "datasets" not in content and (setting := _of_a_training(content)):
        report.error(
            f"{path}: is a config file (it sets {setting}), not a dataset file with [[datasets]]: name it with --config"
        )
        return []
    for name in sorted(set(content) - {"general", "datasets"}):
        line = lines.get((name,)) or lines.get((name, 0))
        near = nearest(name, ("general", "datasets"))
        report.error(
            f"{path}{f':{line}' if line else ''}: {name}: unknown table; expected [general] and [[datasets]]{near}"
        )
    general = table(("general",), content.get("general", {}), _DATASET)
    found: Tables = []
    for d, dataset in enumerate(_tables(path, "datasets", content.get("datasets"), report)):
        at = ("datasets", d)
        own = table(at, {k: v for k, v in dataset.items() if k != "subsets"}, _DATASET)
        subsets = _tables(path, "datasets.subsets", dataset.get("subsets"), report)
        found.append((general | own, [table((*at, "subsets", s), subset, _SUBSET) for s, subset in enumerate(subsets)]))
    return found


def _of_a_training(content: Mapping[str, Any]) -> str:
    """The first setting of a training that is none of images, or nothing."""
    tables = [content, *(table for table in content.values() if isinstance(table, dict))]
    return next(
        (name for table in tables for name in table if name in options.known() and name not in _SUBSET | _DATASET), ""
    )


def _tables(path: Path, name: str, content: Any, report: Report) -> list[dict[str, Any]]:
    if isinstance(content, list) and content and all(isinstance(c, dict) for c in content):
        return content
    report.error(
        f"{path}: expected at least one [[{name}]]" + (f", found {name} = {_some(content)}" if content else "")
    )
    return []


def _some(content: object) -> str:
    """What was found, for a message."""
    return textwrap.shorten(repr(content), 80, placeholder=" ...")


def _table(
    path: Path,
    at: toml.Path_,
    content: Any,
    lines: Mapping[toml.Path_, int],
    known: set[str],
    report: Report,
    lenient: bool,
) -> Found:
    if not isinstance(content, dict):
        report.error(f"{path}: {'.'.join(map(str, at))}: expected a table, found {_some(content)}")
        return {}
    found: Found = {}
    for name, value in content.items():
        place = (*at, name)
        where = f"{path}:{lines[place]}" if place in lines else f"{path}: {'.'.join(map(str, at))}"
        if checked := _setting(Given(name, value, where, False, lenient, path), known, report):
            found[name] = checked
    return found


def _setting(given: Given, known: set[str], report: Report) -> Given | None:
    """A setting with its value converted, or None when it was answered: stated or refused."""
    if given.key in INERT:
        report.note(f"{given}: accepted, no effect: {INERT[given.key]}")
        return None
    if given.key not in known:
        elsewhere = (
            "; it belongs to " + ("[[datasets.subsets]]" if given.key in _SUBSET else "[[datasets]]")
            if given.key in _SUBSET | _DATASET
            else ""
        )
        report.error(f"{given}: unknown setting here{elsewhere or nearest(given.key, known)}")
        return None
    try:
        value = values.convert(_known()[given.key].kind, given.value, text=False)
    except ValueError as e:
        report.error(f"{given}: {e}")
        return None
    given = replace(given, value=value)
    # Folders that kohya's scripts pass over are left to `_acting`, when all of their settings are known.
    if given.lenient and given.key == "num_repeats" and isinstance(value, int) and value < 1:
        return given
    if problem := rules.mistake(_known()[given.key], value):
        report.error(f"{given}: {problem}")
        return None
    return paths.settle(given, Report() if given.lenient and given.key == "image_dir" else report)


@cache
def _known() -> dict[str, options.Option]:
    return {**options.of(DatasetConfig, "data"), **options.of(SubsetConfig, "data")}


# --- folders of folders ---------------------------------------------------------------------------


def from_folders(settings: Settings, given: Mapping[str, Given], report: Report) -> Tables:
    """One dataset of what in_json names or dataset_class gives, or of the folders `<repeats>_<class tokens>` in
    train_data_dir and reg_data_dir; of train_data_dir itself where images follow others, as in kohya's scripts."""
    for flag, name in (("in_json", "metadata_file"), ("dataset_class", "dataset_class")):
        if value := getattr(settings, flag):
            own = {name: value, "image_dir": settings.train_data_dir}
            return [({}, [{key: Given(key, each, f"--{flag}", False) for key, each in own.items() if each}])]
    if settings.method in FOLLOWING and settings.train_data_dir:
        return [({}, [{"image_dir": Given("image_dir", settings.train_data_dir, "train_data_dir", False)}])]
    subsets = [
        s
        for key, folder in (("train_data_dir", settings.train_data_dir), ("reg_data_dir", settings.reg_data_dir))
        if folder
        for s in _folders(key, Path(folder), given, report)
    ]
    return [({}, subsets)] if subsets else []


def _folders(key: str, root: Path, given: Mapping[str, Given], report: Report) -> list[Found]:
    try:
        inside = sorted(
            p for p in paths.expanded(str(root)).iterdir() if os.path.isdir(p) and not p.name.startswith(".")
        )
    except OSError as error:
        if os.path.isdir(root):  # else it is reported with the other paths
            report.error(f"{given.get(key, f'--{key}')}: {root} cannot be read: {error.strerror}")
        return []
    found: list[Found] = []
    for folder in inside:
        match = FOLDER.fullmatch(folder.name)
        if not match or not int(match.group(1)):
            report.note(f"{folder}: left out: its name is not `<repeats>_<class tokens>`")
            continue
        own = {
            "image_dir": str(folder),
            "num_repeats": int(match.group(1)),
            "class_tokens": match.group(2),
            "is_reg": key == "reg_data_dir",
        }
        if problem := next(filter(None, (rules.mistake(_known()[name], value) for name, value in own.items())), ""):
            report.error(f"{paths.short(folder)}: its name says `<repeats>_<class tokens>`: {problem}; rename it")
            continue
        found.append({name: Given(name, value, str(folder), False) for name, value in own.items()})
    if not found:
        report.error(
            f"{given.get(key, f'--{key}')}: {root} has no folder `<repeats>_<class tokens>`, such as "
            f"{root / '10_my cat'}; "
            "for a folder that holds the images itself write a dataset file (dataset_config) with image_dir"
        )
    return found


# --- folders that act ---


def _acting(subsets: Iterable[SubsetConfig], lenient: bool, left_out: list[str]) -> tuple[SubsetConfig, ...]:
    """Each folder, metadata file or class once, and once more as what is to stay as it is; without those that kohya's
    scripts pass over where its file or command is read (`lenient`).

    What is left out is added to `left_out`, with the reason.
    """
    kept: dict[tuple[object, ...], SubsetConfig] = {}
    for subset in subsets:
        place = (*map(_real, (subset.image_dir, subset.metadata_file)), subset.dataset_class, subset.preserved)
        if place in kept:
            left_out.append(
                f"{subset.source}: stands twice in one dataset, and is taken once, with the settings that stand first"
            )
        elif lenient and (why := _passed_over(subset)):
            left_out.append(f"{subset.source}: left out, as in kohya's scripts: {why}")
        else:
            kept[place] = subset
    return tuple(kept.values())


def _real(path: str | None) -> str:
    return os.path.realpath(path) if path and not trouble(path, "file or folder") else path or ""


def _passed_over(subset: SubsetConfig) -> str:
    if subset.num_repeats < 1:
        return f"num_repeats is {subset.num_repeats}"
    if subset.metadata_file or subset.dataset_class:
        return ""
    if problem := trouble(subset.image_dir, "folder"):
        return problem
    found = folders.listing(Path(subset.image_dir), recursive=subset.recursive)
    return "" if found.images or found.troubles else "no images are in it"


# --- falling back ---------------------------------------------------------------------------------


def _dataset(
    table: Found, subsets: list[Found], settings: Settings, used: dict[str, list[Any]], report: Report
) -> DatasetConfig:
    def value(name: str, *levels: Found) -> Any:
        for level in levels:
            if name in level and level[name].value is not None:
                return level[name].value
        flag = _FLAGS.get(name, name)
        if name == "num_repeats" and settings.dataset_repeats == 1:
            flag = name
        return getattr(settings, flag, _known()[name].default)

    def note(name: str, found: Any) -> Any:
        used.setdefault(name, []).append(found)
        return found

    made = []
    for subset in subsets:
        if not subset.keys() & {"image_dir", "metadata_file", "dataset_class"}:
            first = next(iter(subset.values()), None)
            report.error(
                f"{first.where if first else 'a [[datasets.subsets]]'}: image_dir is missing in this "
                "[[datasets.subsets]] (or a metadata_file that names its images)"
            )
        made.append(SubsetConfig(**{f.name: note(f.name, value(f.name, subset, table)) for f in fields(SubsetConfig)}))
    own = {f.name: note(f.name, value(f.name, table)) for f in fields(DatasetConfig) if f.name != "subsets"}
    return DatasetConfig(**own, subsets=tuple(made))


def _unused_flags(
    settings: Settings, given: Mapping[str, Given], used: Mapping[str, list[Any]], report: Report
) -> None:
    """Flags that every dataset overrules."""
    for name, found in used.items():
        flag = _FLAGS.get(name, name)
        flag = flag if flag in given else name
        each = given.get(flag)
        if each is None or settings.value(flag) in found:
            continue
        if each.flag or settings.value(flag) != options.common()[flag].default:
            source = next(filter(None, (getattr(settings, name) for name in SOURCES)))
            report.without_effect(
                each, f"{source} says {name} itself, for every {'dataset' if name in _DATASET - _SHARED else 'folder'}"
            )


# --- checks across settings -----------------------------------------------------------------------

_CUTS = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")
_BUCKETS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
_NOT_CACHED = ("color_aug", "random_crop", "face_crop_aug_range")
_NOT_FINITE = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")


def check(datasets: Iterable[DatasetConfig], settings: Settings, given: Mapping[str, Given], report: Report) -> None:
    """Report what does not go together in the datasets."""
    datasets = tuple(datasets)
    for number, dataset in enumerate(datasets, 1):
        if all(s.is_reg for s in dataset.subsets):
            report.error(f"dataset {number}: {ONLY_REGULARISATION}")
        _check_buckets(dataset, report)
        if dataset.network_multiplier != 1.0 and settings.method not in ("network", "lllite"):
            report.note(f"dataset {number}: network_multiplier: no effect: no adapter is trained, whose strength it is")
        for subset in dataset.subsets:
            _check_subset(subset, settings, report)
    subsets = [s for d in datasets for s in d.subsets]
    follows = settings.method in FOLLOWING
    if settings.masked_loss and not any(s.alpha_mask or (s.conditioning_data_dir and not follows) for s in subsets):
        set_them = "alpha_mask" if follows else "alpha_mask or conditioning_data_dir"
        report.error(f"{given.get('masked_loss', 'masked_loss')}: no folder has masks: set {set_them}")
    _check_preserved(subsets, report)
    _check_validation(subsets, settings, given, report)
    prior = settings.prior_preservation_class or any(s.is_reg for s in subsets)
    if "prior_loss_weight" in given and settings.prior_loss_weight != 1.0 and not prior:
        report.without_effect(
            given["prior_loss_weight"],
            "no folder holds regularisation images (is_reg, reg_data_dir), nor is there a prior_preservation_class",
        )


def _check_preserved(subsets: Sequence[SubsetConfig], report: Report) -> None:
    """Report attributes of images that cannot act."""
    for subset in subsets:
        for name in subset.custom_attributes:
            if name != PRESERVED:
                report.note(f"{subset.source}: custom_attributes.{name}: accepted, no effect: nothing reads it")
    if any(s.preserved for s in subsets) and not any(s.learnt for s in subsets):
        report.note(f"nothing is to be learnt: all folders have custom_attributes.{PRESERVED}, or are regularisation")


def _check_validation(
    subsets: Iterable[SubsetConfig], settings: Settings, given: Mapping[str, Given], report: Report
) -> None:
    """Report what acts on held-out images alone where there are none."""
    if any(s.validation_split and s.learnt for s in subsets):
        return
    why = "no images are held out of training (validation_split)"
    for name in ("validation_seed", *options.of(ValidationConfig, "validation")):
        if name in given and settings.value(name) != options.common()[name].default:
            report.without_effect(given[name], why)
    if any(s.validation_seed != settings.validation_seed for s in subsets):
        report.note(f"validation_seed of a folder: accepted, no effect: {why}")


def _check_buckets(dataset: DatasetConfig, report: Report) -> None:
    plain = DatasetConfig()
    idle = [name for name in _BUCKETS if not dataset.enable_bucket and getattr(dataset, name) != getattr(plain, name)]
    if idle:
        report.note(f"{', '.join(idle)}: no effect without enable_bucket")
    if not dataset.enable_bucket or dataset.bucket_no_upscale:  # which follows from the images alone
        return
    low, high = dataset.bucket_limits
    if low > high:
        report.error(f"min_bucket_reso {dataset.min_bucket_reso} is above max_bucket_reso {dataset.max_bucket_reso}")
    if max(dataset.resolution) > high:
        report.error(
            f"resolution {max(dataset.resolution)} is above max_bucket_reso {dataset.max_bucket_reso}: raise "
            "max_bucket_reso"
        )
    if min(dataset.resolution) < min(low, dataset.min_bucket_reso):
        report.error(
            f"resolution {min(dataset.resolution)} is below min_bucket_reso {dataset.min_bucket_reso}: lower "
            "min_bucket_reso"
        )


def _check_subset(subset: SubsetConfig, settings: Settings, report: Report) -> None:
    def on(names: Iterable[str]) -> list[str]:
        return [name for name in names if getattr(subset, name)]

    if (settings.cache_latents or settings.cache_latents_to_disk) and (found := on(_NOT_CACHED)):
        report.error(
            f"{subset.source}: {', '.join(found)} cannot be used with cache_latents: images are encoded only once "
            "(flip_aug can)"
        )
    if caches_text(settings) and (found := on(_NOT_FINITE)):
        report.error(
            f"{subset.source}: {', '.join(found)} cannot be used with cache_text_encoder_outputs: captions are "
            "encoded only once"
        )
    if not on(_CUTS) and subset.keep_tokens:
        report.note(f"{subset.source}: keep_tokens: no effect without {', '.join(_CUTS[:2])} or {_CUTS[2]}")
    if settings.method in FOLLOWING:
        if not subset.conditioning_data_dir:
            report.error(
                f"{subset.source}: conditioning_data_dir is missing: the folder of the images that these are to "
                "follow, by the same names"
            )
    elif subset.conditioning_data_dir and not settings.masked_loss:
        report.error(
            f"{subset.source}: conditioning_data_dir needs masked_loss: set it, or leave conditioning_data_dir out"
        )


def write(datasets: Iterable[DatasetConfig]) -> str:
    """Datasets as a dataset file that reads back to the same."""
    return toml.write_array("datasets", [(d, {"subsets": d.subsets}) for d in datasets])
