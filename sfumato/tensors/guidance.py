"""Guidance: how a sampler's step is made of what the denoiser predicts with the prompt and with the negative one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceInfo:
    """What b images that are sampled together are guided by."""

    scale: Tensor
    """(b, 1, 1, 1) of classifier-free guidance, each above 1."""
    steps: int
    cond: Mapping[str, Tensor]
    """What `predict` takes for the prompts, without the negative ones; first dimension b."""
    values: Mapping[str, float]
    """The prompts' options that this family has (those of `sampling/prompts.py: OWN` in its `FACTS.prompt`), by
    name."""


class Guidance(Protocol):
    """The guidance of one sampling run; it may keep something from step to step."""

    def uses_negative(self, step: int) -> bool:
        """Whether `step`, counted from 0, needs the prediction with the negative prompt."""
        ...

    def combine(self, positive: Tensor, negative: Tensor, step: int) -> Tensor:
        """The two predictions (b, c, h, w) -> the guided one. Called once in each step that `uses_negative`."""
        ...


@dataclass(frozen=True, slots=True)
class ClassifierFree:
    """Classifier-free guidance in all steps (arXiv:2207.12598)."""

    scale: Tensor

    def uses_negative(self, step: int) -> bool:
        """Always."""
        return True

    def combine(self, positive: Tensor, negative: Tensor, step: int) -> Tensor:
        """From the negative towards and beyond the positive."""
        return negative + self.scale * (positive - negative)


@dataclass(frozen=True, slots=True)
class Truncated:
    """Classifier-free guidance in the first steps alone, its result as strong as the positive prediction (Lumina Image
    2.0, arXiv:2503.21758, as diffusers' Lumina2Pipeline has it).

    sd-scripts and Lumina's own code go otherwise: they guide while the model's clock, 1 - sigma, is below the ratio,
    and limit the norm of the whole prediction, where here it is set in each row of latent pixels.
    """

    scale: Tensor
    steps: int
    cfg_trunc_ratio: float = 1.0
    """Share of the steps that are guided."""
    renorm_cfg: float = 1.0
    """Norm of the result, in those of the positive prediction; 0: as guidance makes it."""

    def uses_negative(self, step: int) -> bool:
        """In the first steps."""
        return (step + 1) / self.steps <= self.cfg_trunc_ratio

    def combine(self, positive: Tensor, negative: Tensor, step: int) -> Tensor:
        """Classifier-free guidance, then renormalised."""
        guided = negative + self.scale * (positive - negative)
        if not self.renorm_cfg:
            return guided
        wanted, norm = (_norm(x, (-1,)) for x in (positive, guided))
        return guided * (wanted / norm) * self.renorm_cfg


@dataclass(slots=True)
class ProjectedMix:
    """Classifier-free guidance up to a step, adaptive projected guidance (arXiv:2410.02416) after it, as HunyuanImage
    2.1 is sampled."""

    scale: Tensor
    start: Tensor
    """(b, 1, 1, 1) the last step, counted from 0, of classifier-free guidance."""
    guidance_rescale: float = 0.0
    """See `rescaled`; of the steps of classifier-free guidance."""
    guidance_rescale_apg: float = 0.0
    """The same of the steps of adaptive projected guidance."""
    apg_scale: float = 10.0
    momentum: float = -0.5
    longest: float = 10.0
    """The largest norm of what is added."""
    average: Tensor | None = None
    """Of positive - negative in the steps until now, weighed by `momentum`."""

    def uses_negative(self, step: int) -> bool:
        """Always."""
        return True

    def combine(self, positive: Tensor, negative: Tensor, step: int) -> Tensor:
        """By one rule or the other, each sample by its own start; the average counts all steps."""
        difference = positive - negative
        self.average = difference if self.average is None else difference + self.momentum * self.average
        plain = negative + self.scale * difference
        projected = negative + self.apg_scale * _orthogonal(_limited(self.average, self.longest), positive)
        return torch.where(
            step > self.start,
            rescaled(projected, positive, self.guidance_rescale_apg),
            rescaled(plain, positive, self.guidance_rescale),
        )


def rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """Guided predictions (b, c, h, w), moved by `share` towards the deviation of the positive ones
    (arXiv:2305.08891, 3.4)."""
    if not share:
        return guided
    wanted, deviation = (x.std(dim=(1, 2, 3), keepdim=True) for x in (positive, guided))
    return share * guided * (wanted / deviation) + (1 - share) * guided


def _limited(x: Tensor, longest: float) -> Tensor:
    """Samples (b, c, h, w), each of no larger norm than `longest`."""
    return x * (longest / _norm(x, (1, 2, 3))).clamp(max=1)


def _norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return norm


def _orthogonal(x: Tensor, to: Tensor) -> Tensor:
    """Samples (b, c, h, w) without their parts along `to`; in fp64, as the two are nearly parallel."""
    wide, along = x.double(), F.normalize(to.double().flatten(1)).view_as(to)
    return (wide - (wide * along).sum(dim=(1, 2, 3), keepdim=True) * along).to(x.dtype)
