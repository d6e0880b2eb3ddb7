"""Rectified flow: straight lines from data to noise, where on them a run trains, and the steps of a sampler back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.tensors.noise import Drawn, NoisySample, perturbation, perturbed
from sfumato.tensors.random import SampleRandom
from sfumato.tensors.shapes import per_sample

SMALLEST = 1e-3
"""No sigma is below this, the least of diffusers' thousand; the weight sigma_sqrt has no bound at 0."""
LARGEST = 1 - 2**-24
"""Nor above this, the last fp32 number before 1: the timestep stays below its end, and noise over signal finite."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Rectified flow (arXiv:2209.03003, arXiv:2403.03206): x = (1 - s) * x0 + s * noise; fields are spelled as kohya's
    flags.

    The net predicts the velocity, noise - x0. The timestep t is s * steps, in fp32. s is continuous, where
    sd-scripts takes one of a thousand for `sigma`, which differs by less than 1/1000 before the shift.
    As in the paper and for SD3, all densities are of s itself; sd-scripts' FLUX counts those of
    logit_normal and mode from the noisy end (u stands for 1 - u).
    """

    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift"] = "sigma"
    sigmoid_scale: float | None = None
    discrete_flow_shift: float | None = None
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"] = "uniform"
    logit_mean: float | None = None
    logit_std: float | None = None
    mode_scale: float | None = None
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] = "raw"
    """How the net's prediction is read: here as a target and a weight, for the loss compares it with a target.

    raw: the velocity. sigma_scaled: the data that follow from it, x - s * v, are compared with the true ones.
    For the squared loss that is the velocity's loss times s^2; the other losses get the same weight, though for
    them the two are not equal. additive: the velocity less the input, noise - x0 - x, which is neither what
    published models were trained to predict nor what samplers expect.
    """
    min_timestep: int | None = None
    max_timestep: int | None = None
    """Whatever the density, s is mapped linearly from [0, 1] to [min, max] / steps, as sd-scripts does for SD3."""
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False
    shift: float = 1.0
    """The family's own: samplers use it, and training does where discrete_flow_shift is not set."""
    steps: int = 1000

    @classmethod
    def of(cls, *configs: object, shift: float = 1.0) -> Flow:
        """Take the fields from config records that spell them alike: a family's `Options`, `NoiseConfig`."""
        values = {f.name: getattr(c, f.name) for c in configs for f in fields(cls) if hasattr(c, f.name)}
        return cls(**(values | {"shift": shift}))

    @property
    def _range(self) -> tuple[int, int]:
        low = 0 if self.min_timestep is None else self.min_timestep
        return low, self.steps if self.max_timestep is None else self.max_timestep

    def draw(self, shape: Sequence[int], rng: SampleRandom, level: float | None = None) -> Drawn:
        """See `NoiseProcess.draw`."""
        sigma = self.sigmas(rng, shape[-2], shape[-1], level)
        drawn = {
            "noise": rng.normal("noise", shape),
            "sigma": sigma,
            "t": sigma * self.steps,
            "noise_to_signal": sigma / (1 - sigma),
            "timestep_weight": self.weight(sigma),
        }
        return drawn | perturbation(shape, rng, self.ip_noise_gamma, self.ip_noise_gamma_random_strength)

    def noise(self, latents: Tensor, drawn: Drawn) -> NoisySample:
        """See `NoiseProcess.noise`."""
        x0, noise = latents.float(), drawn["noise"]
        s = per_sample(drawn["sigma"], x0)
        x = (1 - s) * x0 + s * perturbed(noise, drawn)
        velocity = noise - x0
        target = velocity - x if self.model_prediction_type == "additive" else velocity
        return NoisySample(x, drawn["t"], target, drawn["timestep_weight"], drawn["noise_to_signal"])

    def sigmas(self, rng: SampleRandom, height: int, width: int, level: float | None = None) -> Tensor:
        """(b,) how much of x is noise, in (0, 1), fp32 on the CPU; for latents of `height` x `width`. `level`: as in
        `NoiseProcess.draw`."""
        shift = 1.0
        if self.timestep_sampling in ("sigma", "shift"):
            shift = _or(self.discrete_flow_shift, self.shift)
        elif self.timestep_sampling in ("flux_shift", "nextdit_shift"):
            shift = math.exp(flux_mu((height // 2) * (width // 2)))
        low, high = (edge / self.steps for edge in self._range)
        s = low + (high - low) * shifted(self._random(rng, level), shift)
        return s.clamp(max(low, SMALLEST), min(high, LARGEST))

    def _random(self, rng: SampleRandom, level: float | None = None) -> Tensor:
        """(b,) numbers in [0, 1], distributed as asked for but for shift and range; or where so much of them is
        below."""
        fixed = None if level is None else torch.full((len(rng.keys),), level)

        def normal() -> Tensor:
            return rng.normal("timestep", ()) if fixed is None else torch.special.ndtri(fixed)

        if self.timestep_sampling in ("sigmoid", "shift", "flux_shift"):
            return torch.sigmoid(_or(self.sigmoid_scale, 1.0) * normal())
        if self.weighting_scheme == "logit_normal":
            return torch.sigmoid(_or(self.logit_mean, 0.0) + _or(self.logit_std, 1.0) * normal())
        if self.weighting_scheme == "mode":
            u = rng.uniform("timestep") if fixed is None else 1 - fixed
            return 1 - u - _or(self.mode_scale, 1.29) * (torch.cos(math.pi / 2 * u).square() - 1 + u)
        return rng.uniform("timestep") if fixed is None else fixed

    def weight(self, s: Tensor) -> Tensor:
        """(b,) sigmas in (0, 1) -> (b,) loss weights."""
        weight = torch.ones_like(s)
        if self.weighting_scheme == "sigma_sqrt":
            weight = s.square().reciprocal()
        elif self.weighting_scheme == "cosmap":
            weight = 2 / (math.pi * (1 - 2 * s + 2 * s.square()))
        return weight * s.square() if self.model_prediction_type == "sigma_scaled" else weight

    def scheduler_config(self) -> dict[str, Any]:
        """See `NoiseProcess.scheduler_config`: for FlowMatchEulerDiscreteScheduler, with `prediction_type` for the
        metadata."""
        return {"num_train_timesteps": self.steps, "shift": self.shift, "prediction_type": "flow"}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def shifted(u: Tensor, shift: float) -> Tensor:
    """Numbers in [0, 1], moved towards 1 by a shift above 1: their odds u / (1 - u) times `shift`
    (arXiv:2403.03206)."""
    return u * shift / (1 + (shift - 1) * u)


def flux_mu(tokens: int) -> float:
    """The logarithm of FLUX.1's shift for images of so many tokens, 2 x 2 latent pixels each (Black Forest Labs)."""
    (few, low), (many, high) = (256, 0.5), (4096, 1.15)
    return low + (tokens - few) * (high - low) / (many - few)


def schedule(steps: int, *, shift: float | None = None, mu: float | None = None) -> Tensor:
    """The sigmas of a sampler's steps, from 1 to 0: (steps + 1,), fp32.

    With neither: even down to 1 / steps, as FLUX.1 schnell. `mu`: the same, shifted by e^mu, as FLUX.1 dev and
    Chroma with `flux_mu`; log(6) is Lumina's shift of 6. `shift`: as diffusers' scheduler is set up by a number of
    steps alone, as for SD3: even down to the least of its thousand sigmas, which is itself shifted, then shifted.
    """
    if shift is not None and mu is not None:
        raise ValueError("shift and mu exclude each other")
    factor = math.exp(mu or 0.0) if shift is None else shift
    least = torch.tensor(1 / steps if shift is None else 1 / 1000, dtype=torch.float64)
    end = least if shift is None else shifted(least, shift)
    even = torch.linspace(1, end.item(), steps, dtype=torch.float64)
    return torch.cat([shifted(even, factor), torch.zeros(1)]).float()
