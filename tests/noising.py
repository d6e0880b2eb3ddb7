"""Latents noised at once: what is drawn, and what follows from it."""

from __future__ import annotations

from torch import Tensor

from sfumato.tensors.noise import NoiseProcess, NoisySample
from sfumato.tensors.random import SampleRandom


def noised(process: NoiseProcess, latents: Tensor, rng: SampleRandom) -> NoisySample:
    """`latents` (b, c, h, w) with the random numbers of `rng`."""
    return process.noise(latents, process.draw(latents.shape[1:], rng))
