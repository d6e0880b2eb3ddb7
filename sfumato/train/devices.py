"""Models on devices: read in the number formats in which they are used, moved to where they work, unloaded when they do
not."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato import families
from sfumato.adapters.merging import changes, in_order
from sfumato.config import Config, Method
from sfumato.errors import UserError
from sfumato.families.detect import detect_file
from sfumato.memory.checkpoint import Handle
from sfumato.memory.formats import Held, held, int8_kernel, told
from sfumato.memory.plan import apply_memory_options
from sfumato.memory.quantise import stored_layers
from sfumato.memory.swap import Swap
from sfumato.models import embedding_files
from sfumato.models.base import Family, Models
from sfumato.models.embeddings import Vectors, Words, hidden_by
from sfumato.models.kept import widened
from sfumato.models.loading import (
    keep_when_read,
    materialize_vae,
    merge_when_read,
    outline,
    quantise_when_read,
    read_values,
)
from sfumato.models.streaming import LARGE, sizes
from sfumato.tensors import attention
from sfumato.train import dist, swapping
from sfumato.train.progress import console, progress
from sfumato.train.trainables import Trainable, caches_latents, caches_text, read_adapter, whole_nets


def outline_models(config: Config, method: Method | None = None) -> Models:
    """The base model without values, from the headers of its files; layers that will be kept in fewer bits are so
    already: as is asked for, or frozen ones as their files have them. `method`: None when nothing is trained. Errors:
    `UserError` for what is missing, or does not fit."""
    model = config.model
    family = families.of(config.family)
    models = outline(
        family, model.pretrained_model_name_or_path, config.family, detect=detect_file,
        vae=model.vae, tokenizer=model.tokenizer, later=_later(config, family),
    )  # fmt: skip
    choose_formats(config, models, method)
    for path in config.embedding.textual_inversion_embeddings:
        add_words(models, embedding_files.read(Path(path), models, "textual_inversion_embeddings"), path)
    for path in config.network.base_weights:
        add_words(models, embedding_files.in_adapter(Path(path), models, "base_weights"), path)
    return models


def add_words(models: Models, words: Mapping[str, Vectors], path: str | Path) -> Words:
    """The words of a file act in a model; those that they hide are told."""
    if hidden := hidden_by(models, words):
        console.print(f"{path}: another file has the same word, which this one's takes the place of: {hidden[0]}")
    return Words(models, words)


def choose_formats(config: Config, models: Models, method: Method | None) -> None:
    """Have layers of an outline that will be kept in fewer bits be so, and be read so: see `outline_models`."""
    memory = config.memory
    kernel = int8_kernel(dist.device_of())[0] if memory.int8_matmul else ""
    quantise_when_read(models, kept_in(config, models), memory.quantize_budget, kernel)
    keep_when_read(models, kept_as_stored(config, models, method))
    for name, net in models.made().items():
        models.source.components[name].quantise(net)


def settle(
    config: Config, models: Models, method: Method | None = None, *, adapters: Sequence[tuple[Path, float]] = ()
) -> None:
    """Settle how the nets of an outline are read, whenever that is: each straight into the format that it is used in,
    frozen ones in that of the computation, trained ones as they are trained, the VAE in fp32 where that is safer; with
    `base_weights`, and then `adapters` (files and their strengths), merged into them. `method`: None when nothing is
    trained."""
    strengths = config.network.base_weights_multiplier
    base = [
        ("base_weights", Path(path), strengths[i] if i < len(strengths) else 1.0)
        for i, path in enumerate(config.network.base_weights)
    ]
    _merge_at_load(models, [*base, *(("network_weights", path, strength) for path, strength in adapters)])
    models.tile, models.dtypes = config.memory.vae_tile_size, formats(config, models.family, method)
    models.streamed = frozenset(streamed(config, models, method))


def load_models(
    config: Config, models: Models, method: Method | None = None, *, adapters: Sequence[tuple[Path, float]] = ()
) -> None:
    """`settle`, and then `read_models`."""
    settle(config, models, method, adapters=adapters)
    read_models(config, models)


def read_models(config: Config, models: Models, *, map: bool = True, later: Collection[str] = ()) -> None:
    """Give an outline that is settled its values. `map`: whether tensors may stay backed by the files; not where they
    are used from the CPU's memory, or a file that changes meanwhile would change the training, or end it. Text encoders
    that are streamed get no values, nor do those that are named as `later`, or whose outputs are cached."""
    later = [*_later(config, models.family), *models.streamed, *later]
    with progress("reading weights") as advance:
        read_values(models, dtype=models.dtypes, later=later, map=map, progress=advance)


def formats(config: Config, family: Family, method: Method | None) -> dict[str, torch.dtype]:
    """The number format of each component's weights."""
    precision = dist.precision(config.train.mixed_precision)
    names = [component.name for component in family.components]
    dtype = dict.fromkeys(names, dist.DTYPES[precision])
    if method == "full":
        trained_in = torch.bfloat16 if config.train.full_bf16 else torch.float32
        dtype |= dict.fromkeys(whole_nets(family, config, names), trained_in)
    dtype["vae"] = vae_dtype(config)
    return dtype


def kept_in(config: Config, models: Models) -> dict[str, str]:
    """Component -> what the frozen weights of its blocks are kept in; those that stay as they are are not named."""
    text = config.memory.encoder_format
    names = [name for name in models.source.components if name not in ("denoiser", "vae")]
    asked = {"denoiser": config.memory.denoiser_format, **dict.fromkeys(names, text)}
    return {name: choice for name, choice in asked.items() if choice}


def kept_as_stored(config: Config, models: Models, method: Method | None) -> set[str]:
    """The components whose frozen weights stand in codes in their files, and stay so."""
    parts = models.source.components
    coded = {name for name, weights in parts.items() if weights.tensors.coded} - {"vae", *kept_in(config, models)}
    trained = whole_nets(models.family, config, parts) if method == "full" else ()
    return coded - {*trained, *streamed(config, models, method)} if coded else coded


def widening_notes(config: Config, models: Models, method: Method | None) -> list[str]:
    """For the user: which weights stand in fewer bits in their files than in memory."""
    kept, asked = kept_as_stored(config, models, method), kept_in(config, models)
    others = {name: w for name, w in models.source.components.items() if name not in asked}
    wide = {w.component.title: widened(w.tensors, kept=name in kept) for name, w in others.items()}
    return [f"{title}: {forms} in its file, made wide in memory" for title, forms in wide.items() if forms]


def streamed(config: Config, models: Models, method: Method | None) -> dict[str, int]:
    """The text encoders that are read block by block when captions are encoded, with the bytes that they would take
    whole: where that is done once."""
    asked = config.memory.stream_text_encoders
    if asked is False or not (method is None or caches_text(config)):
        return {}
    quantised = kept_in(config, models)  # they are smaller, and whole
    sized = sizes(models, formats(config, models.family, method))
    found = {name: size for name, size in sized.items() if name not in quantised}
    # Beside a denoiser that is in memory already there is no room to count on.
    large = {name: size for name, size in found.items() if size > LARGE and (method is None or not _has_room(size))}
    # Where one is, all are: none is whole beside it.
    return found if asked or large else {}


def _has_room(size: int) -> bool:
    """Whether a text encoder of this size is faster whole: an accelerator and its host have half as much again free."""
    import psutil

    ask = getattr(getattr(torch, dist.device_of().type, None), "mem_get_info", None)
    try:
        free = ask()[0] if ask else 0
    except RuntimeError:  # some of Intel's cards do not tell
        free = 0
    return bool(min(free, psutil.virtual_memory().available) > 1.5 * size)


def streaming_notes(config: Config, models: Models, method: Method | None) -> list[str]:
    """For the user: which text encoders are streamed."""
    return [
        f"{models.source.components[name].component.title} ({size / 2**30:.1f} GiB) is read block by block while "
        "captions are encoded (--stream_text_encoders)"
        for name, size in streamed(config, models, method).items()
    ]


def quantised(config: Config, models: Models, method: Method | None) -> dict[str, list[Held]]:
    """Component -> its layers that are kept in fewer bits, by format; needs no values."""
    names = [*kept_in(config, models), *sorted(kept_as_stored(config, models, method))]
    dtypes = formats(config, models.family, method)
    return {name: held(models.source.components[name].quantise(models.nets()[name]), dtypes[name]) for name in names}


def quantised_notes(config: Config, models: Models) -> list[str]:
    """For the user: what became of the weights that are in memory in fewer bits, and what multiplies them."""
    layers = {name: stored_layers(net) for name, net in models.made().items()}
    kernel = [f"int8_matmul: {int8_kernel(dist.device_of())[1]}"] if config.memory.int8_matmul else []
    return kernel + [
        f"{models.source.components[name].component.title}: {told(found)}"
        for name, found in layers.items()
        if found and not any(t.is_meta for layer in found.values() for t in layer.parts.values())
    ]


def vae_dtype(config: Config) -> torch.dtype:
    """What the VAE runs in: never fp16, which overflows in these VAEs."""
    half = dist.precision(config.train.mixed_precision) == "bf16" and not config.memory.no_half_vae
    return torch.bfloat16 if half else torch.float32


def _later(config: Config, family: Family) -> list[str]:
    """What may not be needed at all, because its outputs are cached: it is made and read when it is used."""
    encoders = [component.name for component in family.components if component.name not in ("denoiser", "vae")]
    vae = ["vae"] if caches_latents(config) and not config.sample.sample_prompts else []
    return (encoders if caches_text(config) else []) + vae


def check_base_weights(config: Config, models: Models) -> None:
    """That `base_weights` fit the nets, which need no values. Errors: `UserError`, with each file's."""
    if wrong := [message for path in config.network.base_weights for message in _mismatch(models, path)]:
        raise UserError(*wrong)


def _mismatch(models: Models, path: str) -> tuple[str, ...]:
    """Why an adapter cannot be merged into nets of these shapes."""
    try:
        changes(models.nets(), read_adapter(models, Path(path), "base_weights"), lambda layer: 1.0)
    except UserError as error:
        named = (f"base_weights {path}", f"{path}: ")
        return tuple(
            m if m.startswith(named[0]) else f"base_weights {path}: {m.removeprefix(named[1])}" for m in error.messages
        )
    return ()


def _merge_at_load(models: Models, adapters: Sequence[tuple[str, Path, float]]) -> None:
    """Have adapters merged into the nets as their weights are read. `adapters`: the setting that names a file, the
    file, its strength."""
    merged = []
    for flag, path, strength in adapters:
        # Copied: weights may be read again during the training, when the file may be another.
        state = {
            layer: {name: t.clone() for name, t in tensors.items()}
            for layer, tensors in read_adapter(models, path, flag).items()
        }
        merged.append(changes(models.nets(), state, lambda layer, strength=strength: strength))  # type: ignore[misc]
    merge_when_read(models, in_order(*merged))


@dataclass(frozen=True, slots=True)
class Placed:
    """What was done to blocks so that a training fits."""

    handles: Sequence[Handle]
    """The last first."""
    swaps: Sequence[Swap]

    def remove(self) -> None:
        """The blocks are as they were before, those that were streamed on the host."""
        for swap in self.swaps:
            swap.remove()
        for handle in self.handles:
            handle.remove()


def place_models(config: Config, models: Models, trainable: Trainable, device: torch.device) -> Placed:
    """Nets to the device they are used on, those that leave it first; what spares memory around their blocks."""
    attention.choose(config.memory.attention, training=True, card=dist.capability(device))
    if models.encodes() or (models.vaes is not None and not caches_latents(config)):
        materialize_vae(models, device)
    placed = spare(config, models, trainable, device)
    trainable.modules().to(device)
    models.source.check()  # but for frozen blocks that could not be pinned, nothing is backed by files from here on
    return placed


def spare(config: Config, models: Models, trainable: Trainable, device: torch.device) -> Placed:
    """Checkpointing around what gradients pass through, and streaming around that; what is not streamed goes to the
    device."""
    used = ["denoiser", *([] if caches_text(config) else models.encoders)]
    handles = apply_memory_options(models.family.blocks(models.denoiser), config.memory, device, console.print)
    for follower in models.followers:
        handles += apply_memory_options(follower.blocks, config.memory, device, console.print)
    for name in models.encoders:
        if name in trainable.trained:
            blocks = models.family.encoder_blocks(models.encoders[name])
            handles += apply_memory_options(blocks, config.memory, device, console.print)
    choices = swapping.chosen(config, models)
    swaps = [swapping.place(models, name, choices.get(name), device) for name in used]
    return Placed(handles, [swap for swap in swaps if swap])


def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator where there is one, else of this process."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
