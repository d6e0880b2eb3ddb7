"""Sampling with a checkpoint and adapters outside training: `sfumato sample`, the quickstart, notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from sfumato.adapters.insert import AdapterNetwork, from_state
from sfumato.config import Config
from sfumato.data.store import Progress
from sfumato.errors import UserError
from sfumato.families.detect import control_net
from sfumato.memory.plan import apply_memory_options
from sfumato.models import embedding_files
from sfumato.models.base import Models
from sfumato.models.controlled import follow_by
from sfumato.models.embeddings import Words, unasked
from sfumato.models.loading import materialize, materialize_vae, unload
from sfumato.sampling import prompts, sample
from sfumato.sampling.following import check_images
from sfumato.tensors import attention
from sfumato.tensors.noise import NoiseProcess
from sfumato.train import dist, outputs, swapping
from sfumato.train.devices import add_words, outline_models, read_models, settle, vae_dtype
from sfumato.train.progress import console, progress
from sfumato.train.step import autocast
from sfumato.train.trainables import read_adapter


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A loaded model that samples prompts."""

    models: Models
    process: NoiseProcess
    precision: dist.Precision
    device: torch.device
    offload: bool = False
    """Whether nets are on the device only while they are used."""
    encoded: sample.EncodedPrompts | None = None
    """Prompts that were encoded before the denoiser was read; the text encoders have left the memory."""

    @classmethod
    def of(
        cls,
        config: Config,
        device: torch.device | None = None,
        adapters: Sequence[tuple[Path, float]] = (),
        *,
        offload: bool = False,
        only: Sequence[prompts.Prompt] = (),
        controls: Sequence[tuple[Path, float]] = (),
    ) -> Pipeline:
        """The base model of a config with its `base_weights` merged, and then `adapters`, files and their strengths.
        `controls`: the same for control nets, by which it follows images. `only`: all prompts that it will sample, for
        text encoders and denoiser to take turns in memory. Errors: `UserError` for whatever the user can fix."""
        precision = dist.precision(config.train.mixed_precision)
        device = dist.device_of() if device is None else device
        attention.choose(config.memory.attention, half=precision != "no", card=dist.capability(device))
        held = torch.device("cpu") if offload else device
        models = outline_models(config)
        _check_controls(models, controls)
        for path, _ in adapters:
            add_words(models, embedding_files.in_adapter(path, models, "adapter"), path)
        choices = swapping.chosen(config, models)
        settle(config, models, adapters=adapters)
        if only and (idle := unasked(models, (text for p in only for text in (p.prompt, p.negative_prompt)))):
            console.print(f"{', '.join(idle)}: no prompt has this word, which therefore does nothing")
        encoded = _encoded(models, only, precision, device) if only else None
        read_models(config, models, later=list(models.encoders) if only else ())
        blocks = models.family.blocks(models.denoiser)
        for path, strength in controls:
            follower = follow_by(models, str(path), strength, dist.DTYPES[precision])
            follower.net.to(held)
            blocks = [*blocks, *follower.blocks]
        apply_memory_options(blocks, config.memory, device, console.print, training=False)
        swapping.place(models, "denoiser", choices.get("denoiser"), device if choices else held)
        if not only:
            materialize(models, held)
        if models.vaes is not None:
            materialize_vae(models, held)
        return cls(models, models.process(config.noise, config.loss), precision, device, offload, encoded)

    @classmethod
    def decoder(cls, config: Config, device: torch.device) -> Pipeline:
        """The VAE alone; the other nets have no values. Errors: as `of`."""
        models = outline_models(config)
        models.tile, models.dtypes = config.memory.vae_tile_size, {"vae": vae_dtype(config)}
        materialize_vae(models, device)
        precision = dist.precision(config.train.mixed_precision)
        return cls(models, models.process(config.noise, config.loss), precision, device)

    @contextmanager
    def adapted(
        self, *paths: Path, strength: float = 1.0, skip: Callable[[str], bool] = lambda key: False
    ) -> Iterator[list[AdapterNetwork]]:
        """Adapter files, and the words that they hold, act for as long as the context lasts; their `multiplier` may be
        changed. `skip`: whether a key of a file is left out."""
        active, words = [], list[Words]()
        try:
            for path in paths:
                words.append(add_words(self.models, embedding_files.in_adapter(path, self.models, "adapter"), path))
                state = read_adapter(self.models, path, skip=skip)
                network = from_state(self.models.nets(), state).to(self.device).eval()
                network.multiplier = strength
                active.append(network)
            yield active
        finally:
            for network in active:
                network.remove()
            for each in reversed(words):
                each.remove()

    def sample(
        self,
        wanted: Sequence[prompts.Prompt],
        *,
        sampler: str = "ddim",
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """One image per prompt."""
        with autocast(self.device, self.precision):
            return sample.generate(
                self.models, wanted, process=self.process, sampler=sampler, batch_size=batch_size, progress=progress,
                device=self.device if self.offload else None,
            )  # fmt: skip


def _check_controls(models: Models, controls: Sequence[tuple[Path, float]]) -> None:
    """That control nets fit an outline. Errors: `UserError`."""
    for path, strength in controls:
        with control_net(str(path), models.family.name, lite=True):
            follow_by(models, str(path), strength).remove()
    models.followers.clear()


def _encoded(
    models: Models, wanted: Sequence[prompts.Prompt], precision: dist.Precision, device: torch.device
) -> sample.EncodedPrompts:
    """Prompts through the text encoders, which are in memory meanwhile."""
    materialize(models, device)
    with autocast(device, precision):
        encoded = sample.encode_prompts(models, wanted, device)
    unload(models)
    return encoded


def main(
    config: Config,
    adapters: Sequence[tuple[Path, float]] = (),
    controls: Sequence[tuple[Path, float]] = (),
    image: str | None = None,
) -> list[Path]:
    """`sfumato sample`: images of `sample_prompts` with the base model, its `base_weights` and `network_weights`, into
    `output_dir/sample`. `adapters`: more files, and their strengths; `controls`: control nets and theirs; `image`: the
    `controlnet_image` of prompts that have none.

    Errors: `UserError` for whatever the user can fix.
    """
    if not config.sample.sample_prompts:
        raise UserError("sample_prompts is missing: name a file of prompts (.txt, .toml or .json)")
    if config.network.network_weights:
        adapters = [(Path(config.network.network_weights), 1.0), *adapters]
    files = [path for path, _ in adapters]
    plain = prompts.sized(prompts.default(config.family), *files, config.model.pretrained_model_name_or_path)
    wanted = prompts.read_prompts(config.sample.sample_prompts, replace(plain, controlnet_image=image))
    check_images(wanted, len(controls))
    sampler = prompts.sampler(config.sample.sample_sampler)
    outputs.check_samples(Path(config.output.output_dir))
    world = dist.world()
    try:
        pipeline = Pipeline.of(config, world.device, adapters, only=wanted[world.rank :: world.size], controls=controls)
        with (
            autocast(world.device, pipeline.precision),
            progress("sampling images") as advance,
        ):
            return sample.sample(
                pipeline.models, wanted, Path(config.output.output_dir) / "sample", process=pipeline.process,
                name=config.output.output_name,
                sampler=sampler, seed=config.train.seed, rank=world.rank, world=world.size, progress=advance,
                encoded=pipeline.encoded,
            )  # fmt: skip
    finally:
        world.close()
