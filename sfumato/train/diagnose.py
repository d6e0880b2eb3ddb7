"""Why numbers are not finite: examined once, when it has happened, so that no step pays for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.formats.files import PICKLES
from sfumato.models.base import Models
from sfumato.train import dist
from sfumato.train.step import Step, autocast

if TYPE_CHECKING:
    from sfumato.train.loop import Run


def not_finite(run: Run, step: int, loss: float, rates: Mapping[str, float]) -> UserError:
    """What to raise when the loss of a step is not finite: one message, with the cause. `rates`: by group, as they
    acted."""
    what = f"the loss of step {step} is {loss}; nothing was saved after it, earlier results in output_dir are sound"
    inner = getattr(run.training_step, "module", run.training_step)
    assert isinstance(inner, Step)
    models, trainable = inner.unowned
    # Training in place changes what was unpickled; a mapped file is read anew.
    files_of = {name: weights.tensors.paths for name, weights in models.source.components.items()}
    unchanged = [
        n for n, paths in files_of.items() if n not in trainable.trained or not any(p.suffix in PICKLES for p in paths)
    ]
    for causes in (damaged(models, unchanged), _of_batches(run, inner, step)):
        if causes:
            return UserError(f"{what}. {causes[0]}")
    return UserError(f"{what}. {_of_training(run, step, rates)}")


@contextmanager
def blaming(models: Models, components: Iterable[str]) -> Iterator[None]:
    """Within, an error about numbers that are not finite becomes one about the file of the net that made them, if that
    is the cause."""
    try:
        yield
    except UserError as error:
        if any("not finite" in message for message in error.messages) and (causes := damaged(models, components)):
            raise UserError(*causes) from error
        raise


def damaged(models: Models, components: Iterable[str]) -> list[str]:
    """A message for each net whose file holds numbers that are not finite. The files are read for it, one tensor after
    another."""
    components, out = models.source.components, []
    for name in components:
        bad = next(
            (key for key, tensor in components[name].tensors.cast(None, map=False).items() if _broken(tensor)), None
        )
        if bad is not None:
            where, title = components[name].where, components[name].component.title
            out.append(
                f"{where} ({title}): {bad} holds NaN or infinity, so the file is damaged; download or copy it again"
            )
    return out


def _of_batches(run: Run, step: Step, number: int) -> list[str]:
    """What is wrong with the batches of the step."""
    epoch, place = divmod(number - 1, run.budget.steps_per_epoch)
    # By itself: the run's own readers may be on their way to the next batch.
    loader = replace(run.loader, workers=0)
    for batch in next(loader.epoch(epoch, start_step=place)).batches:
        if cause := _of_batch(run, step, batch.to(run.world.device)):
            return [cause]
    return []


@torch.no_grad()
def _of_batch(run: Run, step: Step, batch: Batch) -> str:
    captions = ", ".join(map(repr, batch.captions))
    again = "remove the cache, and it is made again"
    if _broken(batch.latents):
        return f"The cached latents of one of the images with the captions {captions} are not finite: {again}"
    if batch.cond is not None and any(map(_broken, batch.cond.values())):
        return f"The cached text outputs of one of the captions {captions} are not finite: {again}"
    with autocast(run.world.device, step.precision):
        if batch.pixels is not None and _broken(step.latents(batch)):
            return f"The VAE overflows on one of the images with the captions {captions}: set no_half_vae"
        models, trainable = step.unowned
        frozen = not any(name in models.encoders for name in trainable.trained)
        if batch.cond is None and frozen and any(map(_broken, step.cond(batch).values())):
            return (
                f"A text encoder overflows in {step.precision} on one of the captions {captions}: use mixed_precision "
                "bf16 or no"
            )
    return ""


def _of_training(run: Run, number: int, rates: Mapping[str, float]) -> str:
    """Model and batch are sound: what is left is how they were trained."""
    half = dist.precision(run.config.train.mixed_precision) == "fp16"
    if number == run.start_step + 1:
        cure = (
            "use mixed_precision bf16 or no"
            if half
            else "look at network_alpha, noise and loss settings, which scale what is trained"
        )
        return f"It is the first step, the model's files and the batch are sound: {cure}"
    were = ", ".join(f"{rate:g} ({name})" for name, rate in rates.items())
    return (
        f"Lower the learning rate, which was {were}{', or use mixed_precision bf16 in place of fp16' if half else ''}"
    )


def _broken(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
