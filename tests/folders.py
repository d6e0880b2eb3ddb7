"""Folders of small images for tests, and stand-ins for the VAE and the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.data.cache import CachedLatents, CachedText, cache_latents, cache_texts
from sfumato.data.plan import Plan, make_plan
from sfumato.data.store import FileIndex, TensorStore
from sfumato.data.strategies import LatentsCachingStrategy, TextEncoderOutputsCachingStrategy

LATENTS = LatentsCachingStrategy(channels=3)
OUTPUTS = TextEncoderOutputsCachingStrategy(fields=("hidden",))


def noise(size: tuple[int, int], seed: int, mode: str = "RGB") -> Image.Image:
    """An image whose pixels are all different."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode=None).convert(mode) if bands in (1, 3, 4) else Image.new(mode, size)


def folder(
    root: Path, sizes: Sequence[tuple[int, int]] = ((64, 64), (96, 64), (64, 100), (70, 64), (64, 64)), seed: int = 0
) -> Path:
    """Images 0.png ... with captions 0.txt ..."""
    root.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        noise(size, seed + i).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"thing {seed + i}, red, green, blue\n")
    return root


def dataset(*subsets: SubsetConfig, **options: Any) -> DatasetConfig:
    """Buckets of about 64x64 in steps of 16."""
    buckets = {
        "resolution": (64, 64),
        "enable_bucket": True,
        "min_bucket_reso": 32,
        "max_bucket_reso": 128,
        "bucket_reso_steps": 16,
    }
    return DatasetConfig(subsets=subsets, **{**buckets, "batch_size": 2, **options})


def subset(path: Path, **options: Any) -> SubsetConfig:
    return SubsetConfig(image_dir=str(path), **options)


def plan(*datasets: DatasetConfig, index: FileIndex | None = None, **options: Any) -> Plan:
    return make_plan(datasets, index or FileIndex(), **options)


def encode(pixels: Tensor) -> Tensor:
    """Stands in for a VAE: means of 8x8 pixels."""
    return functional.avg_pool2d(pixels, 8)


def latents(
    of: Plan,
    store: TensorStore,
    index: FileIndex,
    vae: str = "vae",
    encode: Callable[[Tensor], Tensor] = encode,
    **options: Any,
) -> CachedLatents:
    return cache_latents(of, store, index, encode, vae, LATENTS, **options)


def tokenize(captions: Sequence[str]) -> dict[str, Tensor]:
    """Stands in for a tokenizer: four numbers that stand for the caption."""
    return {"ids": torch.tensor([list(sha256(caption.encode()).digest()[:4]) for caption in captions])}


def texts(of: Plan, store: TensorStore, index: FileIndex, encoder: str = "clip", **settings: object) -> CachedText:
    def hidden(batches: Sequence[Sequence[str]]) -> Iterator[dict[str, Tensor]]:
        for ids in (tokenize(captions)["ids"] for captions in batches):
            yield {"hidden": ids.float(), "not kept": ids}

    return cache_texts(of, store, index, hidden, encoder, OUTPUTS, settings=settings)
