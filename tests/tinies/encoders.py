"""Tiny text encoders and the 16-channel VAE with random weights, from transformers' and diffusers' classes, and their tokenizers.

Sizes are the real ones' in small and all differ from one another; names and layout are the real ones'. They are in
eval mode and shared between tests: not to be changed. `tiny.text_states` gives CLIP's tensors under the names that files use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import tiny
import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

L_WIDTH, G_WIDTH, T5_WIDTH = 64, 128, 96
"""Of the states of CLIP-L, CLIP-G and T5."""


@cache
def clip_l() -> Any:
    """CLIP-L as SDXL and FLUX have it."""
    return randomised(1, lambda: CLIPTextModel(clip_config(L_WIDTH, 3, "quick_gelu")))


@cache
def clip_l_projected() -> Any:
    """CLIP-L as SD3 has it."""
    return randomised(2, lambda: CLIPTextModelWithProjection(clip_config(L_WIDTH, 3, "quick_gelu")))


@cache
def clip_g() -> Any:
    """OpenCLIP-bigG as SDXL and SD3 have it."""
    return randomised(3, lambda: CLIPTextModelWithProjection(clip_config(G_WIDTH, 4, "gelu")))


@cache
def t5() -> Any:
    """The encoder of T5 v1.1."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=64,
        d_ff=160,
        num_layers=3,
        num_heads=2,
        relative_attention_num_buckets=16,
        feed_forward_proj="gated-gelu",
    )
    return randomised(4, lambda: T5EncoderModel(config))


@cache
def vae16() -> Any:
    """The VAE of SD3 and FLUX, with FLUX's scaling."""
    return randomised(
        5,
        lambda: AutoencoderKL(
            block_out_channels=(32, 32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
    )


def clip_tokenizer(*, g: bool = False) -> Any:
    """CLIP's tokenizer with a small vocabulary; bigG's pads with the token 0."""
    return tiny.tokenizer(v2=g)


@cache
def t5_tokenizer() -> Any:
    """T5's tokenizer with the letters and a few words."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-"
    words = ("a", "the", "of", "on", "in", "cat", "dog", "red", "photo", "mat", "girl", "painting")
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -6.0) for letter in letters] + [(f"▁{word}", -4.0) for word in words]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def clip_config(width: int, layers: int, activation: str) -> CLIPTextConfig:
    """A CLIP text encoder for the small vocabulary."""
    size = len(tiny.vocabulary())
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
    )


def randomised(seed: int, make: Callable[[], Any]) -> Any:
    """A net made with random weights that are the same each time, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        # Biases and norms start at 0 and 1 there, which would hide a wrong place.
        for p in model.parameters():
            if p.ndim == 1:
                p.data += 0.05 * torch.randn_like(p)
    return model.eval()
