"""`sfumato.load`: a model by its path alone, and its verbs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tinies.cases import Case, cases

import sfumato
from sfumato.errors import UserError


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_model_of_any_family_is_loaded_by_its_path(case: Case, tmp_path: Path) -> None:
    files = case.write(tmp_path)
    models = sfumato.load(files.model, vae=files.vae, dtype=torch.bfloat16, **files.options, **case.options)
    assert models.family.name == case.family
    first = next(models.denoiser.parameters())
    assert first.dtype == torch.bfloat16 and not first.requires_grad and not models.denoiser.training
    with torch.no_grad():
        cond = models.encode(models.tokenize(["a cat", ""]))
    assert {len(t) for t in cond.values()} == {2}
    side = models.family.latents.stride
    raw = models.encode_images(torch.zeros(2, 3, 4 * side, 6 * side))
    assert raw.shape == (2, models.family.latents.channels, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        pixels = models.decode(models.scaled(raw))
    assert pixels.shape == (2, 3, 4 * side, 6 * side) and pixels.dtype == torch.float32
    assert torch.equal(pixels, models.decode(models.scaled(raw))), "the VAE runs in its own format under autocast"


def test_what_is_not_a_model_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pretrained_model_name_or_path"):
        sfumato.load(tmp_path / "none.safetensors")


def test_a_model_without_a_vae_says_so(tmp_path: Path) -> None:
    models = sfumato.load(tiny.tiny_sd1(tmp_path))
    models.vaes = None
    with pytest.raises(UserError, match=r"has no VAE, which images must pass through; give one with --vae"):
        models.encode_images(torch.zeros(1, 3, 8, 8))
