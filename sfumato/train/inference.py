"""Images and latents of prompts, written one after another with one loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from sfumato.errors import UserError
from sfumato.sampling import image_files, sample
from sfumato.sampling.following import check_images
from sfumato.sampling.prompts import Prompt
from sfumato.train import outputs
from sfumato.train.pipeline import Pipeline
from sfumato.train.progress import progress
from sfumato.train.step import autocast


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is written where."""

    folder: Path
    images: bool = True
    latents: bool = False
    described: bool = True
    """Whether files say how they were sampled."""

    def __post_init__(self) -> None:
        outputs.check_folder(self.folder)


def write(pipeline: Pipeline, prompts: Sequence[Prompt], output: Output, sampler: str, first: int = 0) -> list[Path]:
    """Sample prompts, whose seeds are set, one by one; the files. `first`: the number of the first in file names."""
    models, device = pipeline.models, pipeline.device if pipeline.offload else None
    paths = []
    with autocast(pipeline.device, pipeline.precision), progress("sampling images") as advance:
        sample.check_prompts(models, prompts, sampler)
        check_images(prompts, len(models.followers))
        encoded = sample.encode_prompts(models, prompts, device)
        for place, prompt in enumerate(prompts, first):
            with sample.on_device(models.denoising(), device):
                (latents,) = sample.sample_latents(
                    models, [prompt], process=pipeline.process, sampler=sampler, encoded=encoded, progress=advance
                )
            path = output.folder / image_files.file_name("image", place, seed=prompt.seed)
            if output.latents:
                paths.append(path.with_name(f"{path.stem}_latent.safetensors"))
                image_files.save_latents(latents, paths[-1], prompt if output.described else None)
            if output.images:
                image = _decoded(pipeline, latents, prompt)
                image_files.save(image, path, prompt if output.described else None, prompt.sample_sampler or sampler)
                paths.append(path)
    return paths


def decode(pipeline: Pipeline, files: Sequence[Path], output: Output) -> list[Path]:
    """Images of files of latents. Errors: one `UserError` for all files that hold something else."""
    channels = pipeline.models.family.latents.channels
    loaded, wrong, paths = list[Tensor](), list[str](), list[Path]()
    for file in files:
        try:
            loaded.append(image_files.load_latents(file, channels))
        except UserError as error:
            wrong += error.messages
    if wrong:
        raise UserError(*wrong)
    for place, (file, latents) in enumerate(zip(files, loaded, strict=True)):
        paths.append(output.folder / image_files.file_name(file.stem, place))
        image_files.save(_decoded(pipeline, latents, Prompt(prompt=file.name)), paths[-1], None, "")
    return paths


def _decoded(pipeline: Pipeline, latents: Tensor, prompt: Prompt) -> Image.Image:
    with sample.on_device([pipeline.models.vae], pipeline.device):
        return sample.decode(pipeline.models, latents, prompt)
