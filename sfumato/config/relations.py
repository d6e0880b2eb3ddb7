"""What relates several settings of all families, beyond the rules that stand with each."""

from __future__ import annotations

import os
from importlib.util import find_spec

from sfumato.config.memory import ATTENTION
from sfumato.config.rules import Clash, Idle
from sfumato.config.run import FOLLOWING, Settings


def caches_text(s: Settings) -> bool:
    """Whether the outputs of the text encoders are kept."""
    return s.cache_text_encoder_outputs or s.cache_text_encoder_outputs_to_disk


def follows_or_masks(s: Settings) -> bool:
    """Whether images have others of the same names beside them."""
    return s.masked_loss or s.method in FOLLOWING


def _swaps_trained(s: Settings) -> bool:
    """Whether blocks of a net that is trained whole are streamed."""
    denoiser = s.blocks_to_swap or s.double_blocks_to_swap or s.single_blocks_to_swap
    return bool(denoiser or (s.text_encoder_blocks_to_swap and s.train_text_encoder))


def _steps_there(s: Settings) -> bool:
    """Whether weights step while their block is on the device, and their state comes there for it."""
    together = s.fused_optimizer_groups
    return (s.fused_backward_pass or s.blockwise_fused_optimizers) and s.optimizer_state_on_cpu and not together


def _precision(s: Settings) -> str:
    return s.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _trains_text(s: Settings) -> bool:
    if caches_text(s) or s.stop_text_encoder_training == 0:
        return False
    if s.method == "full":
        return s.train_text_encoder
    return s.method == "network" and not s.network_train_unet_only and (not s.text_encoder_lr or any(s.text_encoder_lr))


def _agree(s: Settings) -> bool:
    return s.attn_mode == "xformers" if s.xformers else s.attn_mode in ("torch", "sdpa")


def _is_installed(s: Settings) -> bool:
    return s.attn_mode not in ATTENTION or find_spec(ATTENTION[s.attn_mode]) is not None


IDLE = (
    Idle(
        ("conditioning_data_dir",),
        lambda s: not follows_or_masks(s),
        "it holds masks for masked_loss, or the images that a ControlNet follows",
    ),
    Idle(
        ("prior_preservation_class",),
        lambda s: s.prior_preservation_class and not s.prior_loss_weight,
        "prior_loss_weight 0 leaves it no weight",
    ),
    Idle(
        ("fused_clipping",),
        lambda s: s.fused_clipping != "host" and not s.max_grad_norm and _precision(s) != "fp16",
        "max_grad_norm 0 clips nothing",
    ),
    Idle(
        ("dynamo_backend",),
        lambda s: not s.torch_compile and s.dynamo_backend.lower() not in ("inductor", "no"),
        "it needs torch_compile",
    ),
    Idle(
        ("stop_text_encoder_training",),
        lambda s: s.stop_text_encoder_training and not _trains_text(s),
        "the text encoder is not trained anyway",
    ),
    Idle(
        ("text_encoder_lr",),
        lambda s: s.network_train_unet_only and any(s.text_encoder_lr),
        "network_train_unet_only leaves the text encoder alone",
    ),
    Idle(
        ("text_encoder_lr",),
        lambda s: caches_text(s) and any(s.text_encoder_lr),
        "cache_text_encoder_outputs leaves the text encoder alone",
    ),
    Idle(
        ("text_encoder_lr",),
        lambda s: s.stop_text_encoder_training == 0 and any(s.text_encoder_lr),
        "stop_text_encoder_training 0 leaves the text encoder alone",
    ),
    Idle(
        ("network_dim", "network_alpha"),
        lambda s: s.dim_from_weights and s.network_weights,
        "dim_from_weights takes them from network_weights",
    ),
    Idle(
        ("text_encoder_blocks_to_swap",),
        lambda s: s.text_encoder_blocks_to_swap and caches_text(s),
        "captions are encoded before the training, and no text encoder is in its steps",
    ),
    Idle(
        ("xformers",),
        lambda s: not find_spec("xformers"),
        "xformers is not installed; PyTorch's own attention is used, which gives the same result",
    ),
    Idle(
        ("attn_mode",),
        lambda s: s.attn_mode in ("xformers", "flash") and not _is_installed(s),
        "its library is not installed (`pip install xformers` or `flash-attn`); PyTorch's own attention is used, which "
        "gives the same result",
    ),
    Idle(
        ("xformers", "sdpa"),
        lambda s: s.attn_mode and not _agree(s) and _is_installed(s),
        "attn_mode chooses another attention",
    ),
)
"""Settings that do nothing beside others."""

CLASHES = (
    Clash(
        ("dynamo_backend", "torch_compile"),
        lambda s: s.torch_compile and s.dynamo_backend.lower() == "no",
        "torch_compile needs a compiler; leave dynamo_backend out for inductor",
    ),
    Clash(
        ("blocks_to_swap", "double_blocks_to_swap", "single_blocks_to_swap", "text_encoder_blocks_to_swap"),
        lambda s: s.method == "full" and _swaps_trained(s) and not _steps_there(s),
        "trained blocks leave the card as soon as they were used, so they must step before: set fused_backward_pass or "
        "blockwise_fused_optimizers, and optimizer_state_on_cpu, too",
    ),
    Clash(
        ("network_train_text_encoder_only", "network_train_unet_only"),
        lambda s: s.method == "network" and s.network_train_unet_only and s.network_train_text_encoder_only,
        "network_train_unet_only and network_train_text_encoder_only exclude each other; leave both out to train both",
    ),
    Clash(
        ("quantize", "fp8_base", "fp8_base_unet", "fp8_scaled"),
        lambda s: s.method == "full" and s.denoiser_format,
        "`train full` trains the denoiser's weights, and what is trained is not quantised; leave it out",
    ),
    Clash(
        ("quantize_text_encoders",),
        lambda s: s.method == "full" and s.train_text_encoder and s.encoder_format,
        "train_text_encoder trains the text encoders' weights, and what is trained is not quantised",
    ),
    Clash(
        ("stream_text_encoders", "quantize_text_encoders", "fp8_base"),
        lambda s: s.stream_text_encoders and s.encoder_format,
        "text encoders that are read block by block are never in memory whole, so that fewer bits spare nothing",
    ),
    Clash(
        ("fp8_base", "fp8_base_unet", "fp8_scaled"),
        lambda s: s.quantize not in (None, "fp8") and (s.fp8_base or s.fp8_base_unet or s.fp8_scaled),
        "quantize names another format; leave one of the two out",
    ),
    Clash(("xformers", "sdpa"), lambda s: s.xformers and s.sdpa, "xformers and sdpa exclude each other"),
    Clash(
        ("base_weights_multiplier",),
        lambda s: s.base_weights and len(s.base_weights_multiplier) > len(s.base_weights),
        "there are more strengths than base_weights",
    ),
    Clash(
        ("max_timestep", "min_timestep"),
        lambda s: (s.min_timestep or 0) >= (1000 if s.max_timestep is None else s.max_timestep),
        "min_timestep must be below max_timestep",
    ),
    Clash(
        ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
        lambda s: (
            caches_text(s) and (s.train_text_encoder if s.method == "full" else s.network_train_text_encoder_only)
        ),
        "text outputs cannot be kept while the text encoder is trained",
    ),
    Clash(
        ("token_string",),
        lambda s: s.method == "embedding" and not s.token_string,
        "`train embedding` learns a word: name it (--token_string sks)",
    ),
    Clash(
        ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
        lambda s: caches_text(s) and s.token_string,
        "what captions say cannot be kept while a word of theirs is learnt",
    ),
    Clash(
        ("full_bf16",),
        lambda s: s.full_bf16 and _precision(s) != "bf16",
        "weights in bf16 are trained with mixed_precision bf16 alone; set it too, or leave full_bf16 out",
    ),
    Clash(
        ("save_model_as",),
        lambda s: (
            s.method in ("network", "embedding", "lllite") and s.save_model_as in ("diffusers", "diffusers_safetensors")
        ),
        "an adapter is saved as safetensors, ckpt or pt; for diffusers' key names set dialect peft",
    ),
)
"""Settings that cannot stand together."""
