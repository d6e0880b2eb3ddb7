"""The metadata of a saved file: modelspec 1.0.1 and kohya's `ss_*` fields, with hashes as sd-scripts computes
them."""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.config import Config, DatasetConfig, MetadataConfig
from sfumato.errors import UserError
from sfumato.formats.files import file_digest, serialise, stamp, write_text
from sfumato.formats.paths import printable

if TYPE_CHECKING:
    from torch import Tensor

MEMO, REMEMBERED = Path("~/.cache/sfumato/hashes.json"), 1000
"""What `remembered` remembers in, and of how many files: it is read and written whole each time."""
THUMBNAIL = 512 * 1024
"""The most bytes of a picture in the metadata."""
LEGACY_START, LEGACY_LENGTH = 0x100000, 0x10000
"""The bytes that the old, short hash looks at."""
NEEDED = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What `no_metadata` leaves, because loaders read it."""

_FIXED: Mapping[str, object] = {
    "sd_scripts_commit_hash": "",
    "full_fp16": False,
    "lowram": False,
}
"""Fields of sd-scripts for what sfumato does not do; programs that show a file's metadata look for them."""
_OF_ADAPTERS = (
    "network_module",
    "network_dim",
    "network_alpha",
    "network_args",
    "network_dropout",
    "scale_weight_norms",
)
"""Fields that a whole model does not have."""
_OF_WHOLE_MODELS = ("train_text_encoder", "learning_rate_te")
"""Fields that an adapter does not have: its text encoder goes by other settings, and may be trained where these are
"False"."""

_OPTIONS = {  # section of the config -> its fields that are written, as ss_<field>
    "optimizer": (
        "learning_rate text_encoder_lr unet_lr lr_warmup_steps lr_scheduler lr_scheduler_args max_grad_norm ema_decay "
        "learning_rate_te"
    ),
    "train": "gradient_accumulation_steps seed full_bf16 stop_text_encoder_training train_text_encoder",
    "validation": "max_validation_steps validate_every_n_epochs validate_every_n_steps",
    "memory": "gradient_checkpointing",
    "data": (
        "cache_latents caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate "
        "face_crop_aug_range resize_interpolation"
    ),
    "noise": (
        "noise_offset noise_offset_random_strength adaptive_noise_scale multires_noise_iterations "
        "multires_noise_discount "
        "ip_noise_gamma ip_noise_gamma_random_strength zero_terminal_snr min_timestep max_timestep"
    ),
    "loss": (
        "prior_loss_weight min_snr_gamma loss_type huber_schedule huber_c huber_scale masked_loss "
        "scale_v_pred_loss_like_noise_pred v_pred_like_loss"
    ),
    "network": "network_dropout scale_weight_norms",
    "output": "output_name",
    "metadata": "training_comment",
}


# --- modelspec ---


def modelspec(
    architecture: str,
    given: MetadataConfig,
    *,
    title: str,
    implementation: str,
    resolution: tuple[int, int],
    prediction: str,
    date: datetime,
    adapter: str = "",
    encoder_layer: int | None = None,
    timestep_range: tuple[int, int] | None = None,
) -> dict[str, str]:
    """The `modelspec.*` fields.

    `architecture`: "stable-diffusion-v1"; `adapter`: "lora", "textual-inversion" ...; `resolution`: (width, height);
    `prediction`: "epsilon" or "v"; `encoder_layer`: clip_skip; `timestep_range`: first and last step.
    Source: Stability AI's ModelSpec. Errors: as `thumbnail`.
    """
    values: dict[str, object] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/{adapter}" if adapter else architecture,
        "implementation": implementation,
        "title": given.metadata_title or title,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "date": date.replace(microsecond=0).isoformat(),
        "author": given.metadata_author,
        "description": given.metadata_description,
        "license": given.metadata_license,
        "tags": given.metadata_tags,
        "usage_hint": given.metadata_usage_hint,
        "thumbnail": thumbnail(given.metadata_thumbnail),
        "merged_from": given.metadata_merged_from,
        "trigger_phrase": given.metadata_trigger_phrase,
        "preprocessor": given.metadata_preprocessor,
        "is_negative_embedding": "true" if given.metadata_is_negative_embedding else None,
        "prediction_type": prediction,
        "encoder_layer": encoder_layer,
        "timestep_range": f"{timestep_range[0]},{timestep_range[1]}" if timestep_range else None,
    }
    return {f"modelspec.{name}": str(value) for name, value in values.items() if value is not None}


def thumbnail(given: str | None) -> str | None:
    """A picture as a data URL, from a file or as it is. Errors: `UserError` if it is none, or too large for a header
    that every program reads."""
    if given is None or given.startswith("data:image/"):
        return given
    path = Path(given).expanduser()
    kind = mimetypes.guess_type(path.name)[0] or ""
    try:
        size = path.stat().st_size
        if not kind.startswith("image/") or size > THUMBNAIL:
            raise UserError(
                f"metadata_thumbnail {printable(path)}: expected an image of at most {THUMBNAIL >> 10} KiB (it has "
                f"{size / 1024:.0f}), as every program reads it with the file: 256 x 256 in JPEG is usual"
            )
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise UserError(f"metadata_thumbnail {printable(path)}: {error.strerror}") from error


# --- ss_* ---


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """What a scan found of one dataset."""

    config: DatasetConfig
    images: Sequence[int]
    """Images in each subset, without repeats."""
    tags: Sequence[Mapping[str, int]] = ()
    """Of each subset, how often each tag stands in its captions."""
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(width, height) -> images, repeats counted."""
    mean_ar_error: float = 0.0
    """Mean difference of aspect ratio between an image and its bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run knows of itself beyond its config. Names are those of the `ss_*` fields."""

    sfumato_version: str
    session_id: int
    training_started_at: float
    training_finished_at: float
    base_model_version: str
    """sd_v1, sd_v2, sd_v2_v ..."""
    v2: bool
    optimizer: str
    """Class and arguments: `torch.optim.adamw.AdamW(weight_decay=0.1)`; see `called`."""
    mixed_precision: str
    num_train_images: int
    """Repeats counted."""
    num_reg_images: int
    num_validation_images: int = 0
    validation_split: float = 0.0
    validation_seed: int | None = None
    num_batches_per_epoch: int
    total_batch_size: int | None = None
    """Images an optimizer step, over all processes."""
    num_epochs: int
    max_train_steps: int
    steps: int
    epoch: int
    clip_skip: int | None = None
    max_token_length: int | None = None
    network_module: str | None = None
    """As kohya's scripts call it, `networks.lora`; None when a whole model is trained."""
    network_dim: int | None = None
    network_alpha: float | None = None
    network_args: Mapping[str, object] | None = None
    family: Mapping[str, object] = field(default_factory=dict)
    """The family's own fields."""


def training(config: Config, run: RunFacts, datasets: Sequence[DatasetFacts] = ()) -> dict[str, str]:
    """The `ss_*` fields, all as text, "None" where there is nothing (as sd-scripts writes them and others read
    them)."""
    values: dict[str, object] = {
        name: getattr(getattr(config, section), name) for section, names in _OPTIONS.items() for name in names.split()
    }
    values["debiased_estimation"] = config.loss.debiased_estimation_loss
    values["fp8_base"] = config.memory.denoiser_format == "fp8"
    values["fp8_base_unet"] = values["fp8_base"] and config.memory.encoder_format is None
    values["quantize"], values["quantize_text_encoders"] = config.memory.denoiser_format, config.memory.encoder_format
    values |= asdict(run)
    del values["family"]
    values |= {**run.family, **_FIXED}
    if run.network_args:
        values["network_args"] = json.dumps(dict(run.network_args))
    else:
        del values["network_args"]
    others = _OF_ADAPTERS if run.network_module is None else _OF_WHOLE_MODELS
    values = {name: value for name, value in values.items() if name not in others}
    for name in ("text_encoder_lr", "lr_scheduler_args"):
        values[name] = list(values[name]) or None  # type: ignore[call-overload]
    if config.metadata.no_metadata:
        return {name: text for name, text in _texts(values).items() if name in NEEDED}
    return _texts(values | _dataset_fields(datasets))


def called(kind: type, args: Mapping[str, object]) -> str:
    """`ss_optimizer`: a class by its path, and what it was called with: `torch.optim.adamw.AdamW(weight_decay=0.1)`."""
    text = ",".join(f"{name}={value}" for name, value in args.items())
    return f"{kind.__module__}.{kind.__qualname__}" + (f"({text})" if text else "")


def base_model(name: str, kind: str = "sd_model", memo: Path | None = None) -> dict[str, str]:
    """Name and hashes of the base model, or with `kind` "vae" of the VAE. A folder or a hub id has a name alone."""
    path = Path(name)
    if not path.is_file():
        return {f"ss_{kind}_name": path.name if path.exists() else name}
    new = "ss_new_sd_model_hash" if kind == "sd_model" else f"ss_new_{kind}_hash"
    return {f"ss_{kind}_name": path.name, f"ss_{kind}_hash": legacy_hash(path), new: model_hash(path, memo)}


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {f"ss_{name}": str(value) for name, value in values.items()}


def _dataset_fields(datasets: Sequence[DatasetFacts]) -> dict[str, object]:
    """`datasets` whole, and over all of them the folders, tags and resolution that other programs look for."""
    if not datasets:
        return {}
    folders: dict[bool, dict[str, object]] = {False: {}, True: {}}
    tags: dict[str, Counter[str]] = {}
    for d in datasets:
        for subset, count in zip(d.config.subsets, d.images, strict=True):
            folders[subset.is_reg][_folder(subset.source)] = {"n_repeats": subset.num_repeats, "img_count": count}
        for folder, counted in _tags(d).items():
            tags.setdefault(folder, Counter()).update(counted)
    width, height = datasets[0].config.resolution
    return {
        "datasets": json.dumps([_dataset(d) for d in datasets], ensure_ascii=False),
        "dataset_dirs": json.dumps(folders[False], ensure_ascii=False),
        "reg_dataset_dirs": json.dumps(folders[True], ensure_ascii=False),
        "tag_frequency": json.dumps(tags, ensure_ascii=False),
        "bucket_info": json.dumps(_bucket_info(datasets[0])) if len(datasets) == 1 else None,
        "resolution": f"({width}, {height})",
        "enable_bucket": datasets[0].config.enable_bucket,
        "batch_size_per_device": datasets[0].config.batch_size,
        **(_flat(datasets[0].config) if len(datasets) == 1 else {}),
    }


def _flat(dataset: DatasetConfig) -> dict[str, object]:
    """Of a single dataset: its limits of buckets, and what all its folders have in common, as old programs read
    them."""
    low, high = dataset.bucket_limits
    buckets = {"bucket_no_upscale": dataset.bucket_no_upscale, "min_bucket_reso": low, "max_bucket_reso": high}
    folders = {
        name: {getattr(s, name) for s in dataset.subsets}
        for name in ("color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens")
    }
    return buckets | {name: values.pop() for name, values in folders.items() if len(values) == 1}


def _dataset(facts: DatasetFacts) -> dict[str, object]:
    """One entry of `ss_datasets`."""
    plain = asdict(facts.config)
    subsets = plain.pop("subsets")
    for subset, count in zip(subsets, facts.images, strict=True):
        subset["img_count"] = count
        # Where it lay on somebody's disk is nobody's business.
        for name in ("image_dir", "conditioning_data_dir", "metadata_file"):
            subset[name] = _folder(subset[name]) if subset[name] else subset[name]
    repeated = [(s.is_reg, n * s.num_repeats) for s, n in zip(facts.config.subsets, facts.images, strict=True)]
    return {
        "is_dreambooth": not any(s.metadata_file for s in facts.config.subsets),
        "batch_size_per_device": plain.pop("batch_size"),
        "num_train_images": sum(n for reg, n in repeated if not reg),
        "num_reg_images": sum(n for reg, n in repeated if reg),
        **plain,
        "tag_frequency": _tags(facts),
        "bucket_info": _bucket_info(facts),
        "subsets": subsets,
    }


def _folder(path: str) -> str:
    return printable(Path(path).name)


def _bucket_info(facts: DatasetFacts) -> dict[str, object]:
    buckets = {
        str(i): {"resolution": list(size), "count": n} for i, (size, n) in enumerate(sorted(facts.buckets.items()))
    }
    return {"buckets": buckets, "mean_img_ar_error": facts.mean_ar_error}


def _tags(facts: DatasetFacts) -> dict[str, Counter[str]]:
    """folder -> how often each tag stands in its captions."""
    out: dict[str, Counter[str]] = {}
    for subset, counted in zip(facts.config.subsets, facts.tags, strict=False):
        out.setdefault(_folder(subset.source), Counter()).update(counted)
    return out


# --- hashes ---


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of an adapter about to be saved.

    Both are taken of the file as it would be with the `ss_*` fields of `metadata` alone: the first is the sha256 of
    what follows the header, the second 8 hex digits of the sha256 of 64 KiB at 1 MiB.
    """
    parts = serialise(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    header = next(parts)
    payload, window = hashlib.sha256(), hashlib.sha256()
    at = len(header)
    window.update(header[LEGACY_START : LEGACY_START + LEGACY_LENGTH])
    for part in parts:
        payload.update(part)
        window.update(part[max(0, LEGACY_START - at) : max(0, LEGACY_START + LEGACY_LENGTH - at)])
        at += len(part)
    return {"sshs_model_hash": payload.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8]}


def legacy_hash(path: str | Path) -> str:
    """`ss_sd_model_hash`: 8 hex digits of the sha256 of 64 KiB at 1 MiB of a file."""
    with Path(path).open("rb") as file:
        file.seek(LEGACY_START)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]


def model_hash(path: str | Path, memo: Path | None = None) -> str:
    """`ss_new_sd_model_hash`: the sha256 of a whole file. `memo`: as in `remembered`."""
    path = Path(path).resolve()
    return remembered(str(path), [path], lambda: file_digest(path), memo)


def remembered(name: str, paths: Sequence[Path], make: Callable[[], str], memo: Path | None = None) -> str:
    """What `make` finds in some files, read once and not in each run: it is remembered by the files' stamps.

    `memo`: the JSON file that remembers; default `MEMO`. When it cannot be written, nothing is remembered.
    """
    memo = memo or MEMO.expanduser()
    state = [number for path in paths for number in stamp(path)]
    found = _memory(memo).get(name)
    if isinstance(found, list) and found[:-1] == state:
        return str(found[-1])
    digest = make()
    with suppress(UserError):  # a home that cannot be written does not stop a run
        others = [each for each in _memory(memo).items() if each[0] != name]
        newest = dict([*others, (name, [*state, digest])][-REMEMBERED:])
        write_text(memo, json.dumps(newest))  # without an indent, which is over three times slower
    return digest


def _memory(memo: Path) -> dict[str, object]:
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
