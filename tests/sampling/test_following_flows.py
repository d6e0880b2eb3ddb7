"""Samples of transformers that follow an image, against diffusers' pipelines with the same ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from tinies import flux, sd3
from tinies.cases import Case

from sfumato.config import LossConfig, NoiseConfig
from sfumato.models.controlled import follow_by
from sfumato.sampling.sample import sample_latents

STRENGTH = 0.6


def flux_net(transformer: Any) -> Any:
    """Of pixels, as XLabs' and sd-scripts'."""
    common = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    own = {"num_layers": 1, "num_single_layers": 0, "patch_size": 2, "conditioning_embedding_channels": 16}
    return FluxControlNetModel.from_config({**common, **own})


def sd3_net(transformer: Any) -> Any:
    """Of latents; its pipeline gives it zeros for the pooled text."""
    return SD3ControlNetModel.from_config({**transformer.config, "num_layers": 2})


KINDS: dict[str, tuple[Case, Callable[[Any], Any], Any]] = {
    "flux": (next(c for c in flux.CASES if c.variant == "dev"), flux_net, FluxControlNetPipeline),
    "sd3": (next(c for c in sd3.CASES if c.variant == "3.5_medium"), sd3_net, StableDiffusion3ControlNetPipeline),
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_diffusers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, make, pipeline = KINDS[kind]
    plain = case.pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = make(plain.transformer).eval()
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
    net.save_pretrained(tmp_path / "net")
    noise = np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((case.prompt.width, case.prompt.height))
    image.save(tmp_path / "image.png")

    class Followed(pipeline):  # type: ignore[misc]
        def __call__(self, *args: Any, **told: Any) -> Any:
            return super().__call__(
                *args, control_image=image, controlnet_conditioning_scale=STRENGTH, num_images_per_prompt=1, **told
            )

    theirs = Followed(**plain.components, controlnet=net)
    theirs.set_progress_bar_config(disable=True)
    models = case.models(case.write(tmp_path / "model"))
    start = torch.randn(
        1, 16, case.prompt.height // 8, case.prompt.width // 8, generator=torch.Generator().manual_seed(1)
    )
    follow_by(models, str(tmp_path / "net"), STRENGTH)
    process, prompt = models.process(NoiseConfig(), LossConfig()), case.prompt
    found = [
        sample_latents(models, [each], process=process, sampler=case.sampler, noise=start)[0]
        for each in (replace(prompt, controlnet_image=str(tmp_path / "image.png")), prompt)
    ]
    # What the image is encoded to, not something drawn near it.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    with torch.no_grad():
        wanted = case.drawn(theirs, prompt, start.clone())
    torch.testing.assert_close(found[0], wanted, atol=1e-3, rtol=1e-3)
    assert (found[0] - found[1]).abs().max() > 1e-2
