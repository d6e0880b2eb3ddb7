"""Tiny VAEs that are not KL autoencoders of Stable Diffusion's kind, random, of diffusers' classes.

All kinds of their layers are there, and latents are scaled as by the real ones. They are in eval mode and shared between
tests: not to be changed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanImage, AutoencoderKLQwenImage
from torch import Tensor

from sfumato.models.hunyuan_vae import hunyuan_vae_keys
from sfumato.models.qwen_vae import qwen_vae_keys
from tinies.encoders import randomised


@cache
def hunyuan_vae() -> Any:
    """HunyuanImage-2.1's: 64 channels, 32 pixels a side."""
    return randomised(
        11,
        lambda: AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=64,
            block_out_channels=(32, 32, 64, 64, 128, 128),
            layers_per_block=1,
            spatial_compression_ratio=32,
            sample_size=384,
            scaling_factor=0.75289,
        ),
    )


@cache
def qwen_vae() -> Any:
    """Qwen-Image's: 16 channels, 8 pixels a side, videos."""
    return randomised(12, _qwen)


def hunyuan_vae_original() -> dict[str, Tensor]:
    """Its tensors as the original file names them, which is as ComfyUI's does."""
    tensors = hunyuan_vae().state_dict()
    return hunyuan_vae_keys(tensors).to_foreign(tensors)


def qwen_vae_original() -> dict[str, Tensor]:
    """Its tensors as Wan names them, which is as ComfyUI's file does."""
    tensors = qwen_vae().state_dict()
    return qwen_vae_keys(tensors).to_foreign(tensors)


def _qwen() -> Any:
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    for name, p in vae.named_parameters():
        if name.endswith("gamma"):  # 1 there, which would hide a wrong place
            p.data += 0.05 * torch.randn_like(p)
    return vae
