"""What is cached between steps: the images of a run, their latents and the text encoders' outputs of captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sfumato import families
from sfumato.config import Config, DatasetConfig
from sfumato.data.batch import Cond
from sfumato.data.cache import CachedLatents, CachedText, cache_latents, cache_texts, check_fixed, every_caption
from sfumato.data.held_out import evaluation
from sfumato.data.plan import Plan, make_plan
from sfumato.data.prior import with_class
from sfumato.data.store import FileIndex, Progress, TensorStore, default_root
from sfumato.formats import files
from sfumato.formats.files import file_digest
from sfumato.formats.metadata import remembered
from sfumato.models.autoencoders import unscale
from sfumato.models.base import Models, check_sizes
from sfumato.models.embeddings import known
from sfumato.models.loading import materialize, materialize_vae, unload
from sfumato.models.streaming import encode_each
from sfumato.train import dist, lengths, words
from sfumato.train.devices import kept_in
from sfumato.train.diagnose import blaming
from sfumato.train.progress import console, progress
from sfumato.train.step import autocast
from sfumato.train.trainables import caches_latents, caches_text


@dataclass(frozen=True, slots=True)
class Data:
    """The images of a run and where what is made of them is cached."""

    plan: Plan
    latents: TensorStore
    texts: TensorStore
    index: FileIndex
    evaluation: Plan | None = None
    """Of held-out images, where there are some."""

    @property
    def plans(self) -> list[Plan]:
        """All images, by what is done with them."""
        return [self.plan, *([self.evaluation] if self.evaluation else [])]


def open_data(
    config: Config,
    datasets: tuple[DatasetConfig, ...],
    world: dist.World,
    models: Models,
    notify: Callable[[str], None] = console.print,
    *,
    control: bool = False,
) -> Data:
    """Scan the datasets; memory alone is used unless a cache on disk is asked for.

    `models`: what the images must fit; needs no values. `notify`: for what the user should know. `control`: images are
    to follow others (`make_plan`). Errors: `UserError`
    for images that cannot be used, and for options that cannot act with this model or with the caches.
    """
    d = config.data
    check_fixed(datasets, latents=caches_latents(config), texts=caches_text(config))
    on_disk = d.cache_latents_to_disk or d.cache_text_encoder_outputs_to_disk or d.cache_dir
    root = (Path(d.cache_dir) if d.cache_dir else default_root()) if on_disk else None
    index, latents = FileIndex(root), families.of(config.family).latents
    with progress("reading images", quiet=not world.main) as advance:
        plan = make_plan(
            datasets,
            index,
            skip_unreadable=d.skip_unreadable,
            stride=latents.stride,
            multiple=latents.multiple,
            control=control,
            progress=advance,
        )
    plan = words.told(plan, config)
    if word := config.loss.prior_preservation_class:
        plan = with_class(plan, word)
    if world.main:
        wrong = [f"left out: {skip.path}: {skip.reason}" for skip in plan.skipped if skip.unreadable]
        for line in dict.fromkeys([*plan.notes, *wrong]):  # those that are not needed are counted in the notes
            notify(line)
    measured = evaluation(plan, config.validation.max_validation_steps)
    for each in (plan, measured) if measured else (plan,):
        check_sizes(models, each.largest())
        if caches_text(config) and any(subset.enable_wildcard for dataset in datasets for subset in dataset.subsets):
            every_caption(each)  # only wildcards may give too many
    return Data(
        plan,
        TensorStore(root if d.cache_latents_to_disk else None),
        TensorStore(root if d.cache_text_encoder_outputs_to_disk else None),
        index,
        measured,
    )


@dataclass(frozen=True, slots=True)
class Caches:
    """Latents and text outputs; None where they are encoded in each step."""

    latents: CachedLatents | None = None
    texts: CachedText | None = None
    evaluation: Caches | None = None
    """Those of `Data.evaluation`."""


def fingerprint(config: Config, models: Models, component: str) -> str:
    """Changes when a net's outputs do: with its file, with what is merged into it and with the format that it runs in.

    Files are read for it once; later runs remember.
    """
    weights = models.source.components[component].unmerged()
    paths = weights.tensors.paths
    dtype = models.dtypes[component]
    digest = remembered(
        f"{component} of {' '.join(map(str, paths))}",
        paths,
        lambda: files.fingerprint(weights.planned()),
    )
    network = config.network
    merged = [file_digest(path) for path in network.base_weights] if component != "vae" else []
    tiles = [f"tiles {models.tile}"] if models.tile and component == "vae" else []
    strengths = map(str, network.base_weights_multiplier) if merged else ()
    kept = kept_in(config, models).get(component)
    stored = [f"kept in {kept}"] if kept else []
    stored += [str(config.memory.quantize_budget)] if kept == "auto" else []
    stored += ["int8_matmul"] if kept and config.memory.int8_matmul else []
    return " ".join([digest, *merged, *strengths, f"in {dtype}", *stored, *tiles])


def fill_caches(config: Config, data: Data, models: Models, world: dist.World) -> Caches:
    """Encode what is asked to be cached and is not there yet; the first process fills a disk, each its own memory.

    The VAE and the text encoders take turns in memory, where the denoiser is not yet.
    """
    made = [Caches() for _ in data.plans]
    if caches_latents(config):
        with _caching("latents", models, ["vae"], world) as advance:
            for i, plan in enumerate(data.plans):
                made[i] = replace(made[i], latents=_cache_latents(config, data, plan, models, world.device, advance))
        unload(models)
    if caches_text(config):
        with _caching("text outputs", models, models.encoders, world) as advance:
            for i, plan in enumerate(data.plans):
                made[i] = replace(made[i], texts=_cache_texts(config, data, plan, models, world.device, advance))
    # Where all text outputs were found, the captions were counted when they were made.
    if world.main and any(each.texts is None or each.texts.encoded for each in made):
        warn_of_long_captions(config, data, models, console.print)
    for each, whose in zip(made, ("", " of what is measured"), strict=False):
        for name, cached in (("latents", each.latents), ("text outputs", each.texts)):
            if cached and world.main:
                console.print(f"{name}{whose}: {cached}")
    return replace(made[0], evaluation=made[1] if len(made) > 1 else None)


def warn_of_long_captions(config: Config, data: Data, models: Models, notify: Callable[[str], None]) -> None:
    """Print which captions are longer than the text encoders take, with the word that is learnt; `models` needs no
    values."""
    e = config.embedding
    with known(models, e.token_string, e.num_vectors_per_token) if e.token_string else nullcontext():
        limits = models.tokenize_strategy.limits()
    with progress("counting tokens") as advance:
        lines = [line for plan in data.plans for line in lengths.too_long(plan, limits, advance)]
    for line in dict.fromkeys(lines):
        notify(line)


@contextmanager
def _caching(what: str, models: Models, components: Iterable[str], world: dist.World) -> Iterator[Progress]:
    """The first process runs the block before the others, which then find on the disk what it made."""
    with progress(f"caching {what}", quiet=not world.main) as advance, blaming(models, components):
        if not world.main:
            world.wait()
        yield advance
        if world.main:
            world.wait()


def _cache_latents(
    config: Config, data: Data, plan: Plan, models: Models, device: torch.device, advance: Progress
) -> CachedLatents:
    def encode(pixels: Tensor) -> Tensor:
        materialize_vae(models, device)
        return models.encode_images(pixels)

    return cache_latents(
        plan, data.latents, data.index, encode, fingerprint(config, models, "vae"), models.family.latents,
        unscale=lambda x: unscale(models.vae, x), batch_size=config.memory.vae_batch_size, progress=advance,
    )  # fmt: skip


def _cache_texts(
    config: Config, data: Data, plan: Plan, models: Models, device: torch.device, advance: Progress
) -> CachedText:
    def encode(batches: Sequence[Sequence[str]]) -> Iterator[Cond]:
        if batches:
            materialize(models, device)
        with autocast(device, dist.precision(config.train.mixed_precision)):  # as in the step
            return encode_each(models, batches, device, advance)

    prints = ", ".join(f"{name} {fingerprint(config, models, name)}" for name in models.encoders)
    return cache_texts(
        plan, data.texts, data.index, encode, prints, models.outputs,
        settings={**models.tokenize_strategy.settings, **models.encode_strategy.settings}, progress=advance,
    )  # fmt: skip
