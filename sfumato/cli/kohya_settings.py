"""Settings of kohya's scripts that are not ours: another name, no effect here, or not supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sfumato.cli.report import Given, Report

RENAMED: Mapping[str, tuple[str, object]] = {
    "ae": ("vae", None),
    "caption_extention": ("caption_extension", None),
    "diffusers_xformers": ("xformers", None),
    "fp8_vl": ("quantize_text_encoders", "fp8"),
    "lllite_dropout": ("network_dropout", None),
    "lllite_mlp_dim": ("network_dim", None),
    "mem_eff_attn": ("sdpa", None),
    "unsloth_offload_checkpointing": ("cpu_offload_checkpointing", None),
    "use_8bit_adam": ("optimizer_type", "AdamW8bit"),
    "use_flash_attn": ("attn_mode", "flash"),
    "use_lion_optimizer": ("optimizer_type", "Lion"),
    "use_safetensors": ("save_model_as", "safetensors"),
    "use_sage_attn": ("attn_mode", "sageattn"),
}
"""kohya's name -> our name, and the value that it stands for (None: its own)."""

_LIKE: Mapping[str, str] = {
    "mem_eff_attn": "PyTorch's own attention, which needs as little memory and gives the same result",
    "unsloth_offload_checkpointing": "which keeps in the host's memory what that does",
}
"""Names of `RENAMED` by which a user may expect something else, and why ours does for it."""

_KEYED = "what is cached is found by its content, and what does not fit is encoded again"
_DEEPSPEED = (
    "several cards exchange gradients by torch's own means, with the same result; blocks_to_swap, fused_backward_pass "
    "and optimizer_state_on_cpu spare their memory"
)
_CONSOLE = "everything is written to LOG.jsonl beside the result, and the console says what matters"
_ENCODER_DEVICE = "text encoders are on the device while they are used, and on the CPU else"
_ENCODER_FORMAT = "text encoders run in the format of mixed_precision; what would overflow in it is computed in fp32"
_GUI = "a graphical front end writes it; sd-scripts does not read it either"
_CHUNKS = "it never changes results; vae_tile_size spares the VAE's memory"
_PRINTS = "it only changes what is printed"

INERT: Mapping[str, str] = {
    "async_upload": "uploads go on beside the training anyway, and only its end waits for them",
    "cache_info": "sizes and captions are read from the files' headers, quickly, and remembered",
    "console_log_file": _CONSOLE,
    "console_log_level": _CONSOLE,
    "console_log_simple": _CONSOLE,
    "ddp_gradient_as_bucket_view": "it never changes results, and sfumato sets it up itself",
    "ddp_static_graph": "it never changes results, and sfumato sets it up itself",
    "ddp_timeout": "sfumato waits an hour for the slowest process",
    "deepspeed": _DEEPSPEED,
    "disable_mmap_load_safetensors": "it never changes results",
    "epoch": _GUI,
    "fp16_master_weights_and_gradients": _DEEPSPEED,
    "highvram": "no memory is given back between steps anyway",
    "log_config": "the resolved config is always written beside the result, and given to wandb",
    "lowvram": _GUI,
    "lowram": "weights are mapped from the file and read once",
    "mem_eff_save": "results are written tensor by tensor anyway",
    "noise_offset_type": _GUI,
    "offload_optimizer_device": _DEEPSPEED,
    "offload_optimizer_nvme_path": _DEEPSPEED,
    "offload_param_device": _DEEPSPEED,
    "offload_param_nvme_path": _DEEPSPEED,
    "sample_batch_size": "images are sampled one by one while training, which changes none of them",
    "save_clip": "trained text encoders are written with the result anyway",
    "save_t5xxl": "trained text encoders are written with the result anyway",
    "skip_cache_check": _KEYED,
    "skip_latents_validity_check": _KEYED,
    "skip_until_initial_step": (
        "initial_step and initial_epoch always skip what lies before, and a resumed run goes on where its state ends"
    ),
    "split_attn": "padding is hidden by a mask, so that no sample has to be attended to by itself",
    "split_mode": "sd-scripts has taken it back",
    "t5xxl_device": _ENCODER_DEVICE,
    "t5xxl_dtype": _ENCODER_FORMAT,
    "text_encoder_batch_size": "captions are encoded in batches of a size that suits",
    "text_encoder_cpu": _ENCODER_DEVICE,
    "tokenizer_cache_dir": "the CLIP vocabulary comes with sfumato; see tokenizer",
    "vae_chunk_size": _CHUNKS,
    "vae_disable_cache": "a video VAE keeps nothing for frames that do not come",
    "verbose": _PRINTS,
    "zero3_init_flag": _DEEPSPEED,
    "zero3_save_16bit_model": _DEEPSPEED,
    "zero_stage": _DEEPSPEED,
}
"""Accepted without effect, and why."""

_SECRET = "does not belong into command lines and files, which others read"

REFUSED: Mapping[str, str] = {
    "debug_dataset": "is a flag of kohya's command lines alone: `sfumato plan` shows images, buckets and steps",
    "full_fp16": "is not supported, as weights and gradients overflow in fp16: use full_bf16, or mixed_precision fp16",
    "huggingface_token": f"{_SECRET}: use `hf auth login` or the variable HF_TOKEN",
    "lllite_cond_in_channels": "is not supported: the images to follow are RGB, 3 channels; leave it out",
    "lllite_inpaint_masked_input": "is not supported: a ControlNet-LLLite follows RGB images, without a mask",
    "lllite_multiplier": "is network_multiplier of a dataset, in the dataset file; leave it out for 1",
    "llm_adapter_path": "is not supported: the text adapter is read from the base model's file, as by sd-scripts",
    "output_config": "is a flag of kohya's command lines alone: every training writes its settings beside its result",
    "use_t5xxl_cache_only": "is a setting of kohya's: cache_text_encoder_outputs keeps what all text encoders say",
    "wandb_api_key": f"{_SECRET}: use `wandb login` or the variable WANDB_API_KEY",
}
"""Known and refused, and why or what to do instead."""

_T5_ALONE = "use_t5xxl_cache_only"
_AS_HERE: Mapping[str, tuple[object, ...]] = {
    "lllite_cond_in_channels": (3, "3"),
    "lllite_multiplier": (1, "1", "1.0"),
}
"""Values of refused settings that are all that there is here."""
_OFF: tuple[object, ...] = (False, None, "", "no", "none", 0, "0", "0.0", "false", "False", [])


def names() -> frozenset[str]:
    """All of kohya's settings that are not ours."""
    return frozenset({*RENAMED, *INERT, *REFUSED})


def flags() -> frozenset[str]:
    """Those of `names` that sd-scripts has on its command lines."""
    return names() - {name for name, why in INERT.items() if why in (_GUI, _PRINTS)}


def translate(given: Given, report: Report) -> Given | None:
    """The setting in our own words; None when it was answered here: stated, or refused unless it is switched off."""
    if given.key in RENAMED:
        key, value = RENAMED[given.key]
        ours = replace(given, key=key, value=alone(given), where=given.where or f"--{given.key}")
        if given.key in _LIKE and not off(given):
            report.note(f"{given}: read as {key}, {_LIKE[given.key]}")
        if value is None:
            return ours
        return replace(ours, value=value, flag=False) if not off(given) else None
    if given.key == _T5_ALONE and given.lenient:
        return given
    if given.key in INERT:
        report.note(f"{given}: accepted, no effect: {INERT[given.key]}")
    elif not off(given) and alone(given) not in _AS_HERE.get(given.key, ()):
        report.error(f"{given}: {REFUSED[given.key]}")
    return None


def settle(given: dict[str, Given], report: Report) -> None:
    """Settings of kohya's whose meaning depends on others, in our words."""
    each, trained = given.pop(_T5_ALONE, None), given.get("train_text_encoder")
    if each is None or off(each):
        return
    if trained is not None and not off(trained):
        report.note(
            f"{each}: accepted, no effect: text encoders are trained, and T5 is encoded beside them in each step, with "
            "the same result; quantize_text_encoders and text_encoder_blocks_to_swap spare its memory"
        )
        return
    report.note(f"{each}: read as cache_text_encoder_outputs, which gives the same where no text encoder is trained")
    given.setdefault(
        "cache_text_encoder_outputs",
        replace(each, key="cache_text_encoder_outputs", value=True, flag=False, where=each.where or f"--{each.key}"),
    )


def alone(given: Given) -> object:
    """Its value; kohya's flags are read as lists, as nothing is known of them."""
    value = given.value
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def off(given: Given) -> bool:
    """Whether a switch or amount that we do not have is at its "off" value."""
    value = alone(given)
    return value in _OFF and value is not True
