"""Train the model in the box's VAE: a small AutoencoderKL with the strides and the latent scale of Stable Diffusion
1.x."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from pictures import contact_sheet
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SD1_SCALE = 0.18215
"""Stable Diffusion 1.x multiplies latents by this before the U-Net sees them."""
KL_WEIGHT = 1e-6
"""On the KL divergence summed over a picture's latent, beside losses averaged over its pixels."""
COLOUR_WEIGHT = 4.0
"""On the squared error of pictures shrunk to the latent's size: without it the net settles for brown in place of red
and green."""
SHIFT = 5


def build() -> AutoencoderKL:
    """3.4 M parameters; (b, 3, 64, 64) in [-1, 1] <-> (b, 4, 8, 8)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=64,
    )


def read(folder: Path) -> Tensor:
    """All pictures of a folder: (n, 3, h, w), 0 to 1."""
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Each picture mirrored or not, moved a little, its ink more or less colourful; white stays white."""
    b, _, h, w = x.shape
    padded = F.pad(x, (SHIFT,) * 4, value=1.0)
    moves = torch.randint(0, 2 * SHIFT + 1, (b, 2), generator=rng).tolist()
    x = torch.stack([picture[:, dy : dy + h, dx : dx + w] for picture, (dy, dx) in zip(padded, moves, strict=True)])
    mirrored = torch.rand(b, 1, 1, 1, generator=rng) < 0.5
    x = torch.where(mirrored, x.flip(-1), x)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (0.7 + 0.6 * torch.rand(b, 1, 1, 1, generator=rng))
    return (1 - (1 - x) * (0.9 + 0.15 * torch.rand(b, 3, 1, 1, generator=rng))).clamp(0, 1)


def batches(folders: list[Path], shares: list[int], rng: torch.Generator):
    """Endless batches in [-1, 1] with a fixed number of pictures out of each folder."""
    sets = [read(folder) for folder in folders]
    while True:
        picked = [s[torch.randint(0, len(s), (n,), generator=rng)] for s, n in zip(sets, shares, strict=True)]
        yield augment(torch.cat(picked), rng) * 2 - 1


def losses(vae: AutoencoderKL, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(L1 + MSE + colour, KL divergence of a picture's latent): both scalars."""
    posterior = vae.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
    said = vae.decode(z).sample.float()
    kl = (
        0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).sum((1, 2, 3)).mean()
    )
    colour = F.mse_loss(F.avg_pool2d(said, 8), F.avg_pool2d(x, 8))
    return F.l1_loss(said, x) + F.mse_loss(said, x) + COLOUR_WEIGHT * colour, kl


def train(args: argparse.Namespace) -> AutoencoderKL:
    """The moving average of the trained weights."""
    torch.manual_seed(args.seed)
    vae, rng = build(), torch.Generator().manual_seed(args.seed)
    if args.start:
        vae.load_state_dict(load_file(args.start))
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, args.steps, pct_start=0.05, cycle_momentum=False
    )
    source, start = (
        batches([args.pictures, args.strokes], [args.batch - args.batch // 4, args.batch // 4], rng),
        time.monotonic(),
    )
    for step in range(1, args.steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            rebuilt, kl = losses(vae, next(source), rng)
        (rebuilt + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(vae)
        if step % 25 == 0:
            print(
                f"step {step}  L1+MSE {rebuilt.item():.4f}  KL {kl.item():.0f}  {(time.monotonic() - start) / 60:.1f} "
                "min",
                flush=True,
            )
    return average.module.eval()


@torch.no_grad()
def normalise(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold a shift and a scale a channel into the 1x1 convolutions about the latent, so that scaled latents have mean 0
    and variance 1."""
    z = torch.cat([vae.encode(x).latent_dist.mean for x in (pictures * 2 - 1).split(32)])
    mean, gain = z.mean((0, 2, 3)), 1 / (SD1_SCALE * z.std((0, 2, 3)))
    inner, outer = vae.quant_conv, vae.post_quant_conv
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight /= gain[None, :, None, None]
    inner.weight[:4] *= gain[:, None, None, None]
    inner.bias[:4] = (inner.bias[:4] - mean) * gain
    inner.bias[4:] += 2 * gain.log()


@torch.no_grad()
def report(vae: AutoencoderKL, folder: Path, sheet: Path) -> None:
    """Print the reconstruction's error and the latents' moments; draw 64 pictures above their reconstructions."""
    x = read(folder)
    z = torch.cat([vae.encode(part).latent_dist.mean for part in (x * 2 - 1).split(32)])
    said = torch.cat([vae.decode(part).sample for part in z.split(32)]).clamp(-1, 1) / 2 + 0.5
    scaled, error, psnr = z * SD1_SCALE, (said - x).abs().mean(), -10 * (said - x).square().mean().log10()
    print(
        f"{folder.name}: L1 {error:.4f} (of 0..1), PSNR {psnr:.2f} dB; latents: mean {scaled.mean():.3f}, std "
        f"{scaled.std():.3f}"
    )
    picked = torch.linspace(0, len(x) - 1, min(len(x), 64)).long()
    rows = [torch.cat(pair) for pair in zip(x[picked].split(16), said[picked].split(16), strict=True)]
    pixels = (torch.cat(rows) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    contact_sheet([Image.fromarray(p) for p in pixels], 16).save(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, default=Path("runs/emoji/pictures"))
    parser.add_argument(
        "--strokes", type=Path, default=Path("runs/emoji/strokes"), help="line art: a quarter of each batch"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/vae.safetensors"))
    parser.add_argument("--start", type=Path, help="go on from these weights")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    vae = train(args)
    normalise(vae, read(args.pictures))
    save_file({name: t.contiguous() for name, t in vae.state_dict().items()}, args.out)
    for folder in (args.pictures, args.strokes):
        report(vae, folder, args.out.with_name(f"vae-{folder.name}.png"))


if __name__ == "__main__":
    main()
