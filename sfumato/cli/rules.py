"""Settings that would have no effect beside others, values out of range, and settings that cannot stand together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from sfumato.cli import paths
from sfumato.cli.report import Given, Report
from sfumato.config import NetworkConfig
from sfumato.formats.paths import is_text


class View:
    """All settings by name; `method` is what is trained."""

    def __init__(self, values: Mapping[str, Any], method: str) -> None:
        self._values = values
        self.method = method

    def __getattr__(self, name: str) -> Any:
        return self._values[name]


@dataclass(frozen=True, slots=True)
class Idle:
    """Settings that do nothing when `when` holds."""

    keys: tuple[str, ...]
    when: Callable[[View], Any]
    why: str


def _full(v: View) -> bool:
    return v.method == "full"


def _caches_text(v: View) -> bool:
    return bool(v.cache_text_encoder_outputs or v.cache_text_encoder_outputs_to_disk)


def _trains_text(v: View) -> bool:
    if _caches_text(v) or v.stop_text_encoder_training == 0:
        return False
    if _full(v):
        return bool(v.train_text_encoder)
    return not v.network_train_unet_only and (not v.text_encoder_lr or any(v.text_encoder_lr))


def _on_disk(v: View) -> bool:
    return bool(v.cache_latents_to_disk or v.cache_text_encoder_outputs_to_disk)


NETWORK = tuple(NetworkConfig.__dataclass_fields__)
_HUBER = ("huber", "smooth_l1")
_NO_WARMUP = ("constant", "piecewise_constant", "adafactor")


def _only_with(key: str, *schedulers: str) -> Idle:
    """A setting that only some schedulers have."""
    return Idle(
        (key,),
        lambda v: v.lr_scheduler_type or v.lr_scheduler not in schedulers,
        f"only lr_scheduler {' and '.join(schedulers)} has it",
    )


IDLE: tuple[Idle, ...] = (
    Idle((*NETWORK, "dialect"), _full, "no adapter is trained with `train full`"),
    Idle(("unet_lr", "text_encoder_lr"), _full, "`train full` reads learning_rate and learning_rate_te"),
    Idle(
        ("train_text_encoder", "learning_rate_te"),
        lambda v: not _full(v),
        "an adapter's text encoder goes by text_encoder_lr and network_train_unet_only",
    ),
    Idle(("learning_rate_te",), lambda v: _full(v) and not v.train_text_encoder, "it needs train_text_encoder"),
    Idle(
        ("stop_text_encoder_training",),
        lambda v: bool(v.stop_text_encoder_training) and not _trains_text(v),
        "the text encoder is not trained anyway",
    ),
    Idle(
        ("text_encoder_lr",),
        lambda v: v.network_train_unet_only and any(v.text_encoder_lr),
        "network_train_unet_only leaves the text encoder alone",
    ),
    Idle(
        ("text_encoder_lr",),
        lambda v: _caches_text(v) and any(v.text_encoder_lr),
        "cache_text_encoder_outputs leaves the text encoder alone",
    ),
    Idle(
        ("text_encoder_lr",),
        lambda v: v.stop_text_encoder_training == 0 and any(v.text_encoder_lr),
        "stop_text_encoder_training 0 leaves the text encoder alone",
    ),
    Idle(
        ("unet_lr",),
        lambda v: v.network_train_text_encoder_only,
        "network_train_text_encoder_only leaves the denoiser alone",
    ),
    Idle(("dim_from_weights",), lambda v: not v.network_weights, "it needs network_weights"),
    Idle(
        ("network_dim", "network_alpha"),
        lambda v: v.dim_from_weights and v.network_weights,
        "dim_from_weights takes them from network_weights",
    ),
    Idle(("base_weights_multiplier",), lambda v: not v.base_weights, "it needs base_weights"),
    Idle(
        ("save_last_n_epochs",),
        lambda v: not (v.save_every_n_epochs or v.save_n_epoch_ratio),
        "it needs save_every_n_epochs",
    ),
    Idle(("save_last_n_steps",), lambda v: not v.save_every_n_steps, "it needs save_every_n_steps"),
    Idle(
        ("save_last_n_epochs_state",),
        lambda v: not (v.save_state and (v.save_every_n_epochs or v.save_n_epoch_ratio)),
        "it needs save_state and save_every_n_epochs",
    ),
    Idle(
        ("save_last_n_steps_state",),
        lambda v: not (v.save_state and v.save_every_n_steps),
        "it needs save_state and save_every_n_steps",
    ),
    Idle(("save_every_n_epochs",), lambda v: v.save_n_epoch_ratio, "save_n_epoch_ratio decides when results are saved"),
    Idle(("save_state_on_train_end",), lambda v: v.save_state, "save_state saves the state at the end as well"),
    Idle(("max_train_steps",), lambda v: v.max_train_epochs, "max_train_epochs decides how long training takes"),
    Idle(
        ("persistent_data_loader_workers",),
        lambda v: not v.max_data_loader_n_workers,
        "it needs max_data_loader_n_workers",
    ),
    Idle(("lr_scheduler",), lambda v: v.lr_scheduler_type, "lr_scheduler_type takes its place"),
    _only_with("lr_scheduler_num_cycles", "cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    _only_with("lr_scheduler_power", "polynomial"),
    _only_with("lr_scheduler_timescale", "inverse_sqrt"),
    _only_with("lr_scheduler_min_lr_ratio", "cosine_with_min_lr", "warmup_stable_decay"),
    _only_with("lr_decay_steps", "warmup_stable_decay"),
    Idle(
        ("lr_warmup_steps",),
        lambda v: v.lr_scheduler in _NO_WARMUP,
        "this lr_scheduler has no warm-up; constant_with_warmup has",
    ),
    Idle(
        ("lr_warmup_steps",),
        lambda v: v.lr_scheduler_type,
        "a scheduler class of your own has its own arguments, lr_scheduler_args",
    ),
    Idle(
        ("noise_offset_random_strength", "adaptive_noise_scale"), lambda v: not v.noise_offset, "it needs noise_offset"
    ),
    Idle(("multires_noise_discount",), lambda v: not v.multires_noise_iterations, "it needs multires_noise_iterations"),
    Idle(("ip_noise_gamma_random_strength",), lambda v: not v.ip_noise_gamma, "it needs ip_noise_gamma"),
    Idle(
        ("huber_schedule", "huber_c", "huber_scale"),
        lambda v: v.loss_type not in _HUBER,
        f"only loss_type {' and '.join(_HUBER)} have a threshold",
    ),
    Idle(
        ("sample_prompts", "sample_sampler"),
        lambda v: not (v.sample_every_n_steps or v.sample_every_n_epochs or v.sample_at_first),
        "it needs sample_every_n_steps, sample_every_n_epochs or sample_at_first",
    ),
    Idle(
        ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"),
        lambda v: not v.sample_prompts,
        "it needs sample_prompts",
    ),
    Idle(
        ("logging_dir", "log_prefix"),
        lambda v: v.log_with not in ("tensorboard", "all"),
        "it needs log_with tensorboard",
    ),
    Idle(
        ("log_tracker_name", "wandb_run_name"), lambda v: v.log_with not in ("wandb", "all"), "it needs log_with wandb"
    ),
    Idle(("vae_batch_size",), lambda v: not (v.cache_latents or v.cache_latents_to_disk), "it needs cache_latents"),
    Idle(
        ("cache_dir",),
        lambda v: not _on_disk(v),
        "it needs cache_latents_to_disk or cache_text_encoder_outputs_to_disk",
    ),
    Idle(("train_data_dir", "reg_data_dir"), lambda v: v.dataset_config, "dataset_config names the folders"),
    Idle(("reg_data_dir",), lambda v: not v.train_data_dir, "it needs train_data_dir"),
    Idle(
        ("xformers",),
        lambda v: not find_spec("xformers"),
        "xformers is not installed; PyTorch's own attention is used, which gives the same result",
    ),
)


_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\ud800-\udfff]')
_LONGEST = 180
"""Bytes of a name: 255 less what step, component, process and ending add while a file is written."""


@dataclass(frozen=True, slots=True)
class Clash:
    """Settings that cannot stand together."""

    keys: tuple[str, ...]
    """Where the user is pointed to: the first of these that was set."""
    when: Callable[[View], Any]
    why: str


CLASHES: tuple[Clash, ...] = (
    Clash(
        ("network_train_text_encoder_only", "network_train_unet_only"),
        lambda v: not _full(v) and v.network_train_unet_only and v.network_train_text_encoder_only,
        "network_train_unet_only and network_train_text_encoder_only exclude each other; leave both out to train both",
    ),
    Clash(("xformers", "sdpa"), lambda v: v.xformers and v.sdpa, "xformers and sdpa exclude each other"),
    Clash(
        ("base_weights_multiplier",),
        lambda v: v.base_weights and len(v.base_weights_multiplier) > len(v.base_weights),
        "there are more strengths than base_weights",
    ),
    Clash(
        ("max_timestep", "min_timestep"),
        lambda v: (v.min_timestep or 0) >= (1000 if v.max_timestep is None else v.max_timestep),
        "min_timestep must be below max_timestep",
    ),
    Clash(
        ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
        lambda v: _caches_text(v) and (v.train_text_encoder if _full(v) else v.network_train_text_encoder_only),
        "text outputs cannot be kept while the text encoder is trained",
    ),
    Clash(
        ("full_bf16",),
        lambda v: v.full_bf16 and (v.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "bf16",
        "weights in bf16 are trained with mixed_precision bf16 alone; set it too, or leave full_bf16 out",
    ),
    Clash(
        ("save_model_as",),
        lambda v: not _full(v) and v.save_model_as in ("diffusers", "diffusers_safetensors"),
        "an adapter is saved as safetensors, ckpt or pt; for diffusers' key names set dialect peft",
    ),
    Clash(
        ("output_name",),
        lambda v: not v.output_name or any(c in v.output_name for c in "/\\"),
        "expected a file name without folders; the folder is output_dir",
    ),
    Clash(
        ("output_name",),
        lambda v: _RESERVED.match(v.output_name) or v.output_name[-1:] in (".", " "),
        "expected a name that Windows takes too: not CON, NUL, COM1 or the like, and no dot or blank at the end",
    ),
    Clash(
        ("output_name",),
        lambda v: _FORBIDDEN.search(v.output_name),
        'expected a name that Windows takes too: without < > : " | ? * and control characters',
    ),
    Clash(
        ("output_name",),
        lambda v: len(v.output_name.encode(errors="surrogatepass")) > _LONGEST,
        f"expected at most {_LONGEST} bytes: step and ending are put behind it, and no file system takes longer names",
    ),
)

_COUNTS = """
    train_batch_size batch_size num_repeats dataset_repeats gradient_accumulation_steps max_train_steps max_train_epochs
    save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_steps vae_batch_size
    sample_every_n_steps sample_every_n_epochs network_dim clip_skip multires_noise_iterations lr_scheduler_num_cycles
"""
_SIDES = "resolution min_bucket_reso max_bucket_reso"
_SHARES = (
    "caption_dropout_rate caption_tag_dropout_rate network_dropout ema_decay multires_noise_discount "
    "lr_scheduler_min_lr_ratio"
)
_RATES = "learning_rate unet_lr text_encoder_lr learning_rate_te"
_AMOUNTS = """
    max_grad_norm max_data_loader_n_workers keep_tokens seed network_alpha caption_dropout_every_n_epochs
    token_warmup_min token_warmup_step lr_warmup_steps lr_decay_steps scale_weight_norms prior_loss_weight
    stop_text_encoder_training save_last_n_epochs_state save_last_n_steps_state
"""
RANGES: Mapping[str, tuple[float, float | None]] = {
    **dict.fromkeys(_COUNTS.split(), (1, None)),
    **dict.fromkeys(_SHARES.split(), (0, 1)),
    **dict.fromkeys(_AMOUNTS.split(), (0, None)),
    **dict.fromkeys(_SIDES.split(), (1, 16384)),
    **dict.fromkeys(_RATES.split(), (0, 1000)),
    "min_timestep": (0, 999),
    "max_timestep": (1, 1000),
    "bucket_reso_steps": (8, 16384),
    "huber_c": (1e-9, None),
    "min_snr_gamma": (1e-9, None),
}
"""Setting -> lowest and highest value."""
TEXTS: Mapping[str, tuple[str, str]] = {
    "caption_extension": (r"\.?[^./\\\0][^/\\\0]*", "the ending of caption files, such as .txt"),
    "caption_separator": (r".+", "at least one character, such as a comma"),
}
"""Setting -> what its text must look like, as a pattern and in words."""
WHOLE = 2**63 - 1
"""No whole number is larger: further on, nothing can count."""


def in_range(key: str, value: object) -> str:
    """What is wrong with a value of the right type, or nothing."""
    if said := _badly_written(key, value):
        return said
    low, high = RANGES.get(key, (None, None))
    numbers = [
        v
        for v in (value if isinstance(value, tuple) else (value,))
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    if any(abs(v) > WHOLE for v in numbers if isinstance(v, int)):
        return f"expected a number of at most {high or WHOLE}"
    wrong = [v for v in numbers if (low is not None and v < low) or (high is not None and v > high)]
    if not wrong:
        return ""
    span = f"between {low:g} and {high:g}" if high is not None else "above 0" if low == 1e-9 else f"{low:g} or more"
    return f"expected {span}, found {wrong[0]}"


def _badly_written(key: str, value: object) -> str:
    """What is wrong with a text, or nothing. Paths may hold bytes that are no text; what gets into captions and files
    may not."""
    texts = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, str)]
    if key not in paths.names() and not all(map(is_text, texts)):
        return "expected text in UTF-8"
    pattern, words = TEXTS.get(key, ("", ""))
    wrong = [text for text in texts if pattern and not re.fullmatch(pattern, text, re.DOTALL)]
    return f"expected {words}, found {wrong[0]!r}" if wrong else ""


def clashes(values: Mapping[str, Any], given: Mapping[str, Given], method: str, report: Report) -> None:
    """Report what cannot stand together."""
    view = View(values, method)
    for rule in CLASHES:
        if rule.when(view):
            first = next((given[k] for k in rule.keys if k in given), None)
            report.error(f"{first or rule.keys[0]}: {rule.why}")


def idle(
    values: Mapping[str, Any], defaults: Mapping[str, Any], given: Mapping[str, Given], method: str, report: Report
) -> None:
    """Report what a user set that has no effect."""
    view, found = View(values, method), set()
    for rule in IDLE:
        for key in rule.keys:
            if key in given and key in values and key not in found and values[key] != defaults[key] and rule.when(view):
                report.without_effect(given[key], rule.why)
                found.add(key)
