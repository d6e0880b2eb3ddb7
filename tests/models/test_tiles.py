"""Large pictures through a VAE in tiles: exact where nothing looks beyond a tile, no worse than diffusers' where it does."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tinies import encoders, vaes
from torch import Tensor, nn
from torch.nn import functional
from training import config

from sfumato import families
from sfumato.data.strategies import LatentsCachingStrategy
from sfumato.models.base import Models
from sfumato.models.tiles import in_tiles
from sfumato.train.caching import fingerprint
from sfumato.train.devices import load_models, outline_models

KINDS = {
    "kl": (encoders.vae16, LatentsCachingStrategy(channels=16)),
    "hunyuan": (vaes.hunyuan_vae, LatentsCachingStrategy(channels=64, stride=32)),
    "qwen": (vaes.qwen_vae, LatentsCachingStrategy(channels=16, frames=True)),
}


def picture(height: int, width: int) -> Tensor:
    """A smooth one."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([torch.sin(2 * y + i) * torch.cos(1.5 * x - i) for i in range(3)])[None] * 0.8


@pytest.mark.parametrize(("height", "width"), [(96, 160), (40, 264), (72, 64)])
@pytest.mark.parametrize("side", [4, 7, 8])
def test_tiles_are_put_where_they_were_cut(height: int, width: int, side: int) -> None:
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    halve = partial(functional.avg_pool2d, kernel_size=8)
    double = partial(functional.interpolate, scale_factor=8.0)
    seen: list[tuple[int, ...]] = []

    def watched(net: Any, x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[-2:]))
        return net(x)  # type: ignore[no-any-return]

    small = in_tiles(partial(watched, halve), x, side, 8, 1)
    torch.testing.assert_close(small, halve(x))
    assert set(seen) == {(min(8 * side, height), min(8 * side, width))} and len(seen) > 1
    torch.testing.assert_close(in_tiles(partial(watched, double), small, side, 1, 8), double(small))


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_change_no_more_than_diffusers_tiles_do(kind: str) -> None:
    """Random nets look at the whole picture in norms and attention, so no tiles give the same."""
    make, latents = KINDS[kind]
    ours, theirs, side, pixels = make(), deepcopy(make()), 8, 8 * latents.stride
    if latents.frames:
        theirs.enable_tiling(pixels, pixels, pixels * 3 // 4, pixels * 3 // 4)
    else:
        theirs.enable_tiling()
        theirs.tile_sample_min_size, theirs.tile_latent_min_size = pixels, side
    x = picture(pixels, pixels * 3 // 2)
    with torch.no_grad():
        raw = latents.encode(ours, x)
        whole, parts = latents.decode(ours, raw), in_tiles(partial(latents.decode, ours), raw, side, 1, latents.stride)
        assert 1e-3 < (parts - whole).abs().mean() < (latents.decode(theirs, raw) - whole).abs().mean()
        if kind != "hunyuan":  # diffusers' encoding in tiles breaks there: it takes the picture for a video
            parts = in_tiles(partial(latents.encode, ours), x, side, latents.stride, 1)
            assert 1e-3 < (parts - raw).abs().mean() < (latents.encode(theirs, x) - raw).abs().mean()


@pytest.fixture
def models() -> Models:
    family = families.family("flux")
    return Models(
        family=family, options=families.facts("flux").options(), denoiser=nn.Identity(), encoders={}, tokenizers={},
        vaes=encoders.vae16(), dtypes={"vae": None}, tile=64,
    )  # fmt: skip


def test_only_what_is_larger_than_a_tile_is_cut(models: Models) -> None:
    small, large = picture(64, 48), picture(64, 96)
    cut, cut_back = models.encode_images(large), models.decode(models.scaled(models.encode_images(large)))
    kept, kept_back = models.encode_images(small), models.decode(models.scaled(models.encode_images(small)))
    raw = models.scaled(models.encode_images(large))
    models.tile = None
    assert torch.equal(models.encode_images(small), kept)
    assert torch.equal(models.decode(models.scaled(kept)), kept_back)
    assert cut.shape == models.encode_images(large).shape and not torch.allclose(models.encode_images(large), cut)
    assert cut_back.shape == large.shape and not torch.allclose(models.decode(raw), cut_back)


def test_the_setting_reaches_the_vae_and_what_is_kept_of_it(tmp_path: Path) -> None:
    tiny.tiny_sd1(tmp_path)
    whole = config(pretrained_model_name_or_path=str(tmp_path / "model.safetensors"))
    prints = []
    for size in (None, 256, 512):
        chosen = config(pretrained_model_name_or_path=str(tmp_path / "model.safetensors"), vae_tile_size=size)
        models = outline_models(chosen)
        load_models(chosen, models)
        assert models.tile == size
        prints.append([fingerprint(whole, models, component) for component in ("vae", "clip_l")])
    vae, text = zip(*prints, strict=True)
    assert len(set(vae)) == 3 and len(set(text)) == 1
