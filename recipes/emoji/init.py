"""Write the checkpoint from which the model in the box is trained: Stable Diffusion 1.x in small, random but for its
VAE."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig

from sfumato.families.sd import names
from sfumato.formats.files import load, save
from sfumato.formats.names import add_prefix
from sfumato.models.autoencoders import vae_keys
from sfumato.models.encoders.clip import CLIP_HF, HEAD_WIDTH, ClipText

CHANNELS = (64, 96, 128, 160)
CONTEXT = 128
"""Width of the text model, and so of what the U-Net attends to."""
ZERO_AT_START = re.compile(r"out\.2\..*|.*\.proj_out\..*|.*\.out_layers\.3\..*")
"""The last layer of every residual branch, as in the first code of latent diffusion: the untrained net says 0."""


def unet() -> dict[str, Tensor]:
    """A U-Net as of Stable Diffusion 1.x with fewer channels, in LDM names."""
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    net = UNet2DConditionModel(
        block_out_channels=CHANNELS,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
        sample_size=8,
    )
    tensors = net.state_dict()
    tensors = names.unet_keys(tensors).to_native(tensors)
    return {name: torch.zeros_like(t) if ZERO_AT_START.fullmatch(name) else t for name, t in tensors.items()}


def text_model(vocabulary: int) -> dict[str, Tensor]:
    """Two layers of CLIP's text model, in the names of single files."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CONTEXT,
        intermediate_size=4 * CONTEXT,
        num_hidden_layers=2,
        num_attention_heads=CONTEXT // HEAD_WIDTH,
        hidden_act="quick_gelu",
        projection_dim=CONTEXT,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    return CLIP_HF.to_foreign(ClipText(config).state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=Path("runs/emoji/vae.safetensors"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/emoji/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/start.safetensors"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = load(args.vae)
    parts = {
        names.UNET: unet(),
        names.VAE: vae_keys(vae).to_foreign(vae),
        names.CLIP_L: text_model(len(json.loads((args.tokenizer / "vocab.json").read_text()))),
    }
    for prefix, tensors in parts.items():
        print(f"{prefix:40} {sum(t.numel() for t in tensors.values()) / 1e6:6.2f} M parameters")
    save(
        args.out,
        {k: t.contiguous() for prefix, tensors in parts.items() for k, t in add_prefix(tensors, prefix).items()},
        {},
    )


if __name__ == "__main__":
    main()
