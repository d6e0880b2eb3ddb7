"""How latents are noised: what the denoiser gets, what it should predict, and what an error of it weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UserError
from sfumato.tensors.random import SampleRandom
from sfumato.tensors.shapes import per_sample

SNR_LIMIT = 1000.0
"""Debiased and v-scaled weights hold the signal-to-noise ratio below this, as sd-scripts does."""
Drawn = Mapping[str, Tensor]
"""What chance decides of b samples, and what follows from that alone: named tensors whose first dimension is b, or 1.
Made on the host, ahead of the step that takes it."""


@dataclass(frozen=True, slots=True)
class NoisySample:
    """A batch as the denoiser gets it; floats are fp32, all on the latents' device."""

    x: Tensor
    """(b, c, h, w) what the denoiser gets."""
    t: Tensor
    """(b,) its timestep, in the process's own units."""
    target: Tensor
    """(b, c, h, w) what it should predict."""
    weight: Tensor
    """(b,) loss weight of the timestep."""
    noise_to_signal: Tensor
    """(b,) noise over signal; infinite where there is no signal."""


class NoiseProcess(Protocol):
    """A way from data to noise."""

    @property
    def steps(self) -> int:
        """Number of timesteps: t lies in [0, steps)."""
        ...

    def draw(self, shape: Sequence[int], rng: SampleRandom, level: float | None = None) -> Drawn:
        """What chance decides for latents of `shape` (c, h, w), on the CPU; sample i depends on `rng.keys[i]` alone.

        `level`: in (0, 1), for a timestep that is not left to chance: the one below which this share of those that are
        trained on lies.
        """
        ...

    def noise(self, latents: Tensor, drawn: Drawn) -> NoisySample:
        """Noise latents (b, c, h, w), scaled as the denoiser takes them, with what was drawn, on their device."""
        ...

    def scheduler_config(self) -> dict[str, Any]:
        """The config of diffusers' schedulers for the way back."""
        ...


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """Discrete diffusion (arXiv:2006.11239) on Stable Diffusion's schedule; fields are spelled as kohya's flags."""

    prediction: Literal["eps", "v"] = "eps"
    """The net predicts the noise, or the velocity of arXiv:2202.00512."""
    steps: int = 1000
    zero_terminal_snr: bool = False
    min_timestep: int | None = None
    max_timestep: int | None = None
    noise_offset: float | None = None
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False
    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False

    @classmethod
    def of(cls, prediction: Literal["eps", "v"], *configs: object) -> DDPM:
        """Take the fields from config records that spell them alike (`NoiseConfig`, `LossConfig`)."""
        values = {f.name: getattr(c, f.name) for c in configs for f in fields(cls) if hasattr(c, f.name)}
        return cls(prediction=prediction, **values)

    def __post_init__(self) -> None:
        """Errors: `UserError` for what is not for this prediction; all else is checked in the config."""
        v = self.prediction == "v"
        wrong = {
            "zero_terminal_snr: needs a model that predicts v": self.zero_terminal_snr and not v,
            "scale_v_pred_loss_like_noise_pred: is for models that predict v": self.scale_v_pred_loss_like_noise_pred
            and not v,
            "v_pred_like_loss: is for models that predict noise, not v": self.v_pred_like_loss and v,
        }
        if any(wrong.values()):
            raise UserError(*(f"{message}; change it or leave it out" for message, holds in wrong.items() if holds))

    @property
    def _range(self) -> tuple[int, int]:
        low = 0 if self.min_timestep is None else self.min_timestep
        return low, self.steps if self.max_timestep is None else self.max_timestep

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(steps,) share of signal in the variance of x at each t, fp32 on the CPU."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, self.steps) ** 2
        signal = torch.cumprod(1 - betas, 0)
        if not self.zero_terminal_snr:
            return signal
        # arXiv:2305.08891, algorithm 1: shift the last amplitude to zero, keep the first.
        root = signal.sqrt()
        rescaled: Tensor = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
        return rescaled

    def draw(self, shape: Sequence[int], rng: SampleRandom, level: float | None = None) -> Drawn:
        """See `NoiseProcess.draw`."""
        low, high = self._range[0], max(self._range[1], self._range[0] + 1)
        if level is None:
            t = rng.integers("timestep", low, high)
        else:
            t = torch.full((len(rng.keys),), int(low + level * (high - low)))
        signal = self.alphas_cumprod[t]
        drawn = {
            "noise": rng.normal("noise", shape),
            "t": t,
            "amplitude": signal.sqrt(),
            "noise_amplitude": (1 - signal).sqrt(),
            "noise_to_signal": ((1 - signal) / signal).sqrt(),
            "timestep_weight": self.weight(t),
        }
        if self.noise_offset:
            drawn["offset"] = rng.normal("noise offset", (shape[0], 1, 1))
            drawn["offset_strength"] = self._offset_strength(rng)
        if self.multires_noise_iterations:
            drawn |= self._pyramids(shape, rng)
        return drawn | perturbation(shape, rng, self.ip_noise_gamma, self.ip_noise_gamma_random_strength)

    def noise(self, latents: Tensor, drawn: Drawn) -> NoisySample:
        """See `NoiseProcess.noise`."""
        x0 = latents.float()
        noise = self._texture(x0, drawn)
        a, s = (per_sample(drawn[name], x0) for name in ("amplitude", "noise_amplitude"))
        x = a * x0 + s * perturbed(noise, drawn)
        target = noise if self.prediction == "eps" else a * noise - s * x0
        return NoisySample(x, drawn["t"], target, drawn["timestep_weight"], drawn["noise_to_signal"])

    def weight(self, t: Tensor) -> Tensor:
        """(b,) whole numbers t on the CPU -> (b,) loss weights: the product of all that are asked for."""
        signal, v = self.alphas_cumprod[t], self.prediction == "v"
        snr = signal / (1 - signal)
        limited = snr.clamp(max=SNR_LIMIT)
        weight = torch.ones_like(snr)
        if self.min_snr_gamma is not None:  # arXiv:2303.09556
            weight = weight * (
                snr.clamp(max=self.min_snr_gamma) / (snr + 1) if v else (self.min_snr_gamma / snr).clamp(max=1)
            )
        if self.scale_v_pred_loss_like_noise_pred:
            weight = weight * limited / (limited + 1)
        if self.v_pred_like_loss:
            weight = weight * (1 + self.v_pred_like_loss * (limited + 1) / limited)
        if self.debiased_estimation_loss:  # arXiv:2310.08442
            weight = weight * (1 / (limited + 1) if v else limited.rsqrt())
        return weight

    def scheduler_config(self) -> dict[str, Any]:
        """See `NoiseProcess.scheduler_config`; the keys that a scheduler class does not know are not for it."""
        config = {
            "num_train_timesteps": self.steps,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon" if self.prediction == "eps" else "v_prediction",
            # As in Stable Diffusion's own scheduler files.
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "skip_prk_steps": True,
        }
        # Only trailing steps begin at the last timestep, which is what the rescaled schedule is for (arXiv:2305.08891,
        # 3.3).
        return config | (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if self.zero_terminal_snr else {}
        )

    def _texture(self, x0: Tensor, drawn: Drawn) -> Tensor:
        """The noise of the batch (b, c, h, w), with offset and further resolutions where asked for."""
        noise = drawn["noise"]
        if self.noise_offset:
            strength = drawn["offset_strength"]
            if self.adaptive_noise_scale:
                strength = (strength + self.adaptive_noise_scale * x0.mean((2, 3), keepdim=True).abs()).clamp(min=0)
            noise = noise + strength * drawn["offset"]
        if not self.multires_noise_iterations:
            return noise
        for i in range(self.multires_noise_iterations):
            if f"multires_{i}" in drawn:
                noise = noise + drawn[f"multires_{i}"]
        # Back to unit deviation.
        return torch.stack([one / one.std() for one in noise])

    def _offset_strength(self, rng: SampleRandom) -> Tensor:
        """(b or 1, 1, 1, 1), but for what depends on the latents."""
        strength = torch.full((1, 1, 1, 1), self.noise_offset or 0.0)
        if self.noise_offset_random_strength:
            strength = strength * rng.uniform("noise offset strength").view(-1, 1, 1, 1)
        return strength

    def _pyramids(self, shape: Sequence[int], rng: SampleRandom) -> dict[str, Tensor]:
        """Multi-resolution noise: what is added to each sample's own, by resolution. A sample of which one dimension
        has shrunk to 1 gets no more."""
        levels = [self._pyramid(shape, SampleRandom([key])) for key in rng.keys]
        none = torch.zeros(tuple(shape))
        return {
            f"multires_{i}": torch.stack([own[i] if i < len(own) else none for own in levels])
            for i in range(max(map(len, levels)))
        }

    def _pyramid(self, shape: Sequence[int], rng: SampleRandom) -> list[Tensor]:
        """Ever coarser noise (c, h, w) for one sample."""
        c, h, w = shape
        levels = []
        for i in range(self.multires_noise_iterations or 0):
            shrink = (2 + 2 * float(rng.uniform(f"multires shrink {i}"))) ** i
            small = (max(1, int(h / shrink)), max(1, int(w / shrink)))
            coarse = rng.normal(f"multires {i}", (c, *small))
            levels.append(F.interpolate(coarse, size=(h, w), mode="bilinear")[0] * self.multires_noise_discount**i)
            if 1 in small:
                break
        return levels


def perturbation(
    shape: Sequence[int], rng: SampleRandom, gamma: float | None, random_strength: bool
) -> dict[str, Tensor]:
    """For `perturbed`: nothing, or the "ip_noise" (b, *shape) that is added."""
    if not gamma:
        return {}
    noise = rng.normal("ip noise", shape)
    strength = per_sample(rng.uniform("ip noise strength"), noise) if random_strength else 1.0
    return {"ip_noise": gamma * strength * noise}


def perturbed(noise: Tensor, drawn: Drawn) -> Tensor:
    """Noise (b, c, h, w) as the input gets it: a little more than is in the target (input perturbation,
    arXiv:2301.11706)."""
    return noise + drawn["ip_noise"] if "ip_noise" in drawn else noise
