"""Tiny Stable Diffusion models with random weights, made from diffusers' and transformers' classes, for all tests.

Sizes are the real ones' in small; names, layout and number of blocks are the real ones'. The same seed gives the
same weights in every layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfumato.families.sd.names import CLIP_H, CLIP_L, VAE, unet_keys
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.models.autoencoders import vae_keys
from sfumato.models.detection import PREFIX
from sfumato.models.encoders.clip import CLIP_BARE, OPEN_CLIP
from sfumato.models.encoders.tokenizers import BOS, EOS, byte_letters, stock_vocabulary

WIDTH = 64
"""Of the text states."""
LAYERS = 3
"""Of the text encoder, as far as they are used."""


def tiny_sd1(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """`folder/model.safetensors`, a 1.x single file, with `folder/tokenizer` beside it."""
    return _single(folder, single_file(v2=False, dtype=dtype), v2=False)


def short_sd1(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The same with less than half of the blocks, for tests of what is not the net's: three levels of one block each,
    the last without attention."""
    return _single(folder, single_file(v2=False, dtype=dtype, short=True), v2=False)


def tiny_sd2(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """`folder/model.safetensors`, a 2.x single file, with `folder/tokenizer` beside it."""
    return _single(folder, single_file(v2=True, dtype=dtype), v2=True)


def tiny_sd1_diffusers(folder: Path) -> Path:
    """`folder` with the weights of `tiny_sd1`, as `StableDiffusionPipeline` saves them."""
    pipeline(v2=False).save_pretrained(folder)
    return folder


def tiny_sd2_diffusers(folder: Path, prediction: str = "epsilon") -> Path:
    """`folder` with the weights of `tiny_sd2`, as `StableDiffusionPipeline` saves them."""
    pipeline(v2=True, prediction=prediction).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Parts:
    """The models of others, in eval mode; not to be changed."""

    unet: Any
    vae: Any
    text: Any


@cache
def parts(*, v2: bool, seed: int = 0, short: bool = False) -> Parts:
    """diffusers' and transformers' own models."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = (64, 64, 128, 128) if v2 else (32, 64, 64, 64)
        fewer: dict[str, Any] = {}
        if short:
            channels = channels[:3]
            fewer = {
                "layers_per_block": 1,
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            }
        unet = UNet2DConditionModel(
            **fewer,
            sample_size=8,
            block_out_channels=channels,
            attention_head_dim=[c // 64 for c in channels] if v2 else 8,
            use_linear_projection=v2,
            cross_attention_dim=WIDTH,
        )
        vae = AutoencoderKL(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
        )
        size = len(vocabulary())
        config = CLIPTextConfig(
            vocab_size=size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=1,
            hidden_act="gelu" if v2 else "quick_gelu",
            projection_dim=WIDTH,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
        )
        text = CLIPTextModel(config)
        # Biases and norms start at 0 and 1 there, which would hide a wrong place.
        for model in (unet, vae, text):
            for p in model.parameters():
                if p.ndim == 1:
                    p.data += 0.05 * torch.randn_like(p)
    return Parts(unet.eval(), vae.eval(), text.eval())


def vocabulary() -> dict[str, int]:
    """CLIP's bytes and first merges, and the marks."""
    letters = byte_letters()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(a + b for a, b in stock_vocabulary()[1][:200]),
        BOS,
        EOS,
    ]
    return {token: i for i, token in enumerate(tokens)}


def tokenizer(*, v2: bool = False) -> Any:
    """A CLIP tokenizer with a small vocabulary."""
    return CLIPTokenizer(
        vocab=vocabulary(), merges=stock_vocabulary()[1][:200], pad_token="!" if v2 else EOS, model_max_length=77
    )


def pipeline(*, v2: bool, prediction: str = "epsilon", short: bool = False) -> StableDiffusionPipeline:
    """diffusers' pipeline of the parts."""
    p = parts(v2=v2, short=short)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    return StableDiffusionPipeline(
        vae=p.vae,
        text_encoder=p.text,
        tokenizer=tokenizer(v2=v2),
        unet=p.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def text_states(text: Any) -> dict[str, Tensor]:
    """The text model's tensors with `text_model.`, whatever this release of transformers calls them."""
    tensors = text.state_dict()
    return dict(tensors) if any(name.startswith("text_model.") for name in tensors) else CLIP_BARE.to_native(tensors)


def single_file(*, v2: bool, dtype: torch.dtype = torch.float32, short: bool = False) -> dict[str, Tensor]:
    """All tensors of a single file, those that belong to no net as well."""
    p = parts(v2=v2, short=short)
    unet, vae, text = p.unet.state_dict(), p.vae.state_dict(), text_states(p.text)
    nets = add_prefix(unet_keys(unet).to_native(unet), PREFIX) | add_prefix(vae_keys(vae).to_foreign(vae), VAE)
    nets |= add_prefix(OPEN_CLIP.to_native(text), CLIP_H) if v2 else add_prefix(text, CLIP_L)
    others = {"alphas_cumprod": torch.linspace(1, 0, 1000), "model_ema.decay": torch.tensor(0.9999)}
    if v2:
        last = f"{CLIP_H}transformer.resblocks.{LAYERS - 1}."
        others |= {
            name.replace(last, f"{CLIP_H}transformer.resblocks.{LAYERS}."): t + 1
            for name, t in nets.items()
            if name.startswith(last)
        }
        others |= {f"{CLIP_H}text_projection": torch.eye(WIDTH), f"{CLIP_H}logit_scale": torch.tensor(4.6)}
    else:
        others[f"{CLIP_L}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {name: t.to(dtype) for name, t in nets.items()} | others


def _single(folder: Path, tensors: dict[str, Tensor], *, v2: bool) -> Path:
    save(folder / "model.safetensors", tensors, {})
    tokenizer(v2=v2).save_pretrained(folder / "tokenizer")
    return folder / "model.safetensors"
