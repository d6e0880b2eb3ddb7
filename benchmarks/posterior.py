"""How far a latent sampled from a VAE's posterior lies from the posterior's mean, which sfumato trains on.

sd-scripts samples latents from the posterior (once, where they are cached), sfumato takes its mean. Prints the
deviation of the sample beside the deviation of the latents themselves, and how much the decoded images differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato.data.folders import listing
from sfumato.data.images import flat
from sfumato.data.scan import open_image

ROOT = Path(__file__).parents[1]


def pixels(path: Path, side: int) -> Tensor:
    """(1, 3, side, side) in [-1, 1]."""
    image = flat(open_image(path)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/emoji/model.safetensors"), help="a model with a VAE")
    parser.add_argument("--images", type=Path, default=ROOT / "examples/emoji/lineart")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--count", type=int, default=30)
    args = parser.parse_args()
    vae: Any = sfumato.load(args.model).vae.float()
    rng = torch.Generator().manual_seed(0)
    means, spreads, changes = [], [], []
    for path in listing(args.images).images[: args.count]:
        posterior = vae.encode(pixels(path, args.side)).latent_dist
        sampled = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
        means.append(posterior.mean)
        spreads.append(posterior.std)
        changes.append((vae.decode(sampled).sample - vae.decode(posterior.mean).sample).abs().mean() * 127.5)
    latents, spread = torch.cat(means).std().item(), torch.cat(spreads).square().mean().sqrt().item()
    print(f"{len(means)} images of {args.side} px: latents' deviation {latents:.4f}, posterior's {spread:.4f}")
    print(
        f"a sample is off by {spread / latents:.2%} of the latents' deviation, {(spread / latents) ** 2:.4%} of their "
        "variance"
    )
    print(f"decoded, it differs by {torch.stack(changes).mean():.2f} of 255 levels on average")


if __name__ == "__main__":
    main()
