"""From a batch to its loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from sfumato.config import LossConfig
from sfumato.data.batch import Batch, Cond
from sfumato.models.base import Models, SampleInfo
from sfumato.tensors import losses
from sfumato.tensors.noise import Drawn, NoiseProcess, NoisySample
from sfumato.tensors.random import SampleRandom
from sfumato.tensors.shapes import per_sample
from sfumato.train.dist import DTYPES, Precision
from sfumato.train.trainables import Trainable


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Mixed precision on `device`, or nothing for "no"."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def draw(models: Models, process: NoiseProcess, sizes: Tensor, keys: Sequence[int]) -> Drawn:
    """`Batch.drawn`, of samples with these `Batch.sizes` and `Batch.keys`: on the CPU, so ahead of the step."""
    latents, rng = models.family.latents, SampleRandom(keys)
    shape = latents.channels, *(side // latents.stride for side in sizes[0, 4:].tolist())
    return {**process.draw(shape, rng), **models.family.draw(models, sizes, rng)}


class Step(nn.Module):
    """A batch -> the sum of its samples' weighted errors (a scalar, fp32).

    A module, so that DistributedDataParallel can wrap it; it owns what is trained and only uses the rest.
    """

    def __init__(
        self, models: Models, trainable: Trainable, process: NoiseProcess, loss: LossConfig, precision: Precision
    ) -> None:
        super().__init__()
        self.trained = trainable.modules()
        # In a tuple, so that the frozen nets do not become submodules.
        self.unowned = (models, trainable)
        self.process, self.loss, self.precision = process, loss, precision

    def forward(self, batch: Batch) -> Tensor:
        return self.losses(batch).sum()

    def losses(self, batch: Batch) -> Tensor:
        """The weighted error (b,) of each sample, fp32."""
        models, trainable = self.unowned
        trainable.on_batch(batch)
        # A VAE gives latents in whatever order its last layer left them in memory, and nets take over the order. With
        # channels last, torch's GroupNorm crashes the process in the backward pass on the CPU where its input needs no
        # gradient.
        latents = models.scaled(self.latents(batch)).contiguous()
        with autocast(latents.device, self.precision):
            noised = self.process.noise(latents.float(), batch.drawn)
            trainable.on_noise(noised.t / self.process.steps)
            prior = self._prior(batch, noised)
            prediction = self._prediction(batch, noised)
        threshold = losses.huber_threshold(
            self.loss.huber_schedule,
            self.loss.huber_c,
            self.loss.huber_scale,
            noised.t,
            noised.noise_to_signal,
            self.process.steps,
        )
        error = partial(losses.loss, self.loss.loss_type, prediction.float(), c=threshold)
        target, mask = noised.target.float(), batch.mask
        if prior is None:
            return losses.sample_losses(error(target), mask, noised.weight, batch.weight)
        if batch.preserve is not None:
            target = torch.where(per_sample(batch.preserve, prior) > 0, prior, target)
        wrong = error(target)
        if mask is not None:
            wrong = wrong * mask + error(prior) * (1 - mask) * self.loss.masked_prior_weight
        return losses.sample_losses(wrong, None, noised.weight, batch.weight)

    def _prediction(self, batch: Batch, noised: NoisySample) -> Tensor:
        models, _ = self.unowned
        cond = models.condition(self.cond(batch), SampleInfo(sizes=batch.sizes, drawn=batch.drawn))
        return models.predict(noised.x, noised.t, cond)

    def _prior(self, batch: Batch, noised: NoisySample) -> Tensor | None:
        """What the base model predicts, fp32, where it is a target of some sample, or of what its mask leaves out."""
        _, trainable = self.unowned
        if batch.preserve is None and (batch.mask is None or not self.loss.masked_prior_weight):
            return None
        context = trainable.without()
        assert context is not None  # checked by `train/check.py`
        with torch.no_grad(), context:
            return self._prediction(batch, noised).float()

    def cond(self, batch: Batch) -> Cond:
        """The batch's cond, as cached or encoded now."""
        if batch.cond is not None:
            return {name: t.float() if t.is_floating_point() else t for name, t in batch.cond.items()}
        if batch.tokens is None:
            raise RuntimeError("a batch without cond and without tokens")
        models, trainable = self.unowned
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(name in models.encoders for name in trainable.trained)
        ):
            return models.encode(batch.tokens)

    def latents(self, batch: Batch) -> Tensor:
        """The batch's raw latents, as cached or encoded now."""
        if batch.latents is not None:
            return batch.latents
        if batch.pixels is None:
            raise RuntimeError("a batch without latents and without pixels")
        return self.unowned[0].encode_images(batch.pixels)
