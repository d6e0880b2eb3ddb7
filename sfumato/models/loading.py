"""Load and save a whole model of any family."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.adapters.merging import Change
from sfumato.config import FamilyOptions
from sfumato.data.store import Progress
from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.folders import aside_folder
from sfumato.formats.planned import Writable
from sfumato.memory.formats import quantise
from sfumato.memory.quantise import Stored
from sfumato.models import components, locate, saving
from sfumato.models.base import Family, Models, TokenizerSpec
from sfumato.models.components import Checkpoint
from sfumato.models.encoders.tokenizers import is_stock
from sfumato.models.kept import keep
from sfumato.models.meta_init import drop, shapes
from sfumato.models.ondemand import LaterTokenizer, OnDemand

NAME = "pretrained_model_name_or_path"
Dtypes = torch.dtype | Mapping[str, torch.dtype | None] | None
Detect = Callable[[Path, str], object]
"""(file or folder, the setting that names it): `families.detect.detect_file`, which refuses what is not a whole model,
with what it seems to be. Handed in, as families are above this floor."""


def examine(
    family: Family, path: str, options: FamilyOptions, *, detect: Detect | None = None, vae: str | None = None
) -> tuple[Any, Checkpoint]:
    """The options completed from the files, and where the components of a checkpoint are; headers are read and nothing
    else.

    Errors: `UserError` for what is missing, of no component, or contradicts the options.
    """
    where = locate.local(path, NAME)
    if detect:
        detect(where, NAME)
    source = components.open_model(
        where, family.components, family.title,
        given=_given(family, options, vae), passthrough_keys=family.passthrough_keys,
    )  # fmt: skip
    if wrong := missing(family, source):
        raise UserError(*wrong)
    with locate.understood(str(where)):
        return family.complete(options, source)


def outline(
    family: Family,
    path: str,
    options: FamilyOptions,
    *,
    detect: Detect | None = None,
    vae: str | None = None,
    tokenizer: str | None = None,
    later: Collection[str] = (),
) -> Models:
    """The model without values: its nets on the meta device, for all that headers show. `read_values` fills
    it.

    `later`: text encoders and VAE that are made when they are asked for, with their tokenizers, if they are needed at
    all: their libraries take seconds to import. Errors: as `examine`, and for tensors that do not fit their net.
    """
    options, source = examine(family, path, options, detect=detect, vae=vae)
    tokenizers = {
        name: _tokenizer(family.tokenizer_specs[name], source, options, tokenizer, later=name in later)
        for name in source.components
        if name in family.tokenizer_specs
    }

    def empty(name: str) -> nn.Module:
        net = source.components[name].empty()
        if name in tokenizers:
            _check_vocabulary(name, family.tokenizer_specs[name], tokenizers[name], net)
        return net

    makers = {name: partial(empty, name) for name in source.components}
    denoiser = makers.pop("denoiser")()
    vaes = OnDemand({"vae": makers.pop("vae")}) if "vae" in makers else None
    models = Models(
        family=family,
        options=options,
        denoiser=denoiser,
        encoders=OnDemand(makers),
        tokenizers=tokenizers,
        vaes=vaes,
        source=source,
    )
    models.make(name for name in source.components if name not in later)
    return models


def outline_parts(family: Family, path: str, options: FamilyOptions, vae: str | None = None) -> Models:
    """Those nets of a model that a file or folder (and the files that are named for its parts) holds, without values:
    for what is done to weights, where a VAE, a tokenizer or a text encoder may be missing. Encoders are made when they
    are asked for.

    Errors: `UserError` if there is no denoiser, and, where nothing is missing, as `examine`.
    """
    where = locate.local(path, NAME)
    source = components.open_model(
        where, family.components, family.title,
        given=_given(family, options, vae), passthrough_keys=family.passthrough_keys,
    )  # fmt: skip
    if "denoiser" not in source.components:
        raise UserError(f"{where} holds no denoiser of {family.title}")
    if not missing(family, source):  # else what follows from the missing is left open
        with locate.understood(str(where)):
            options, source = family.complete(options, source)
    nets = {name: weights.empty for name, weights in source.components.items() if name != "vae"}
    denoiser = nets.pop("denoiser")()
    return Models(
        family=family, options=options, denoiser=denoiser, encoders=OnDemand(nets), tokenizers={}, vaes=None,
        source=source,
    )  # fmt: skip


def missing(family: Family, source: Checkpoint) -> list[str]:
    """A message for each component that a model must have and that is not there."""
    return components.lacking(source, [part for part in family.components if part.name not in family.optional])


def _given(family: Family, options: FamilyOptions, vae: str | None) -> dict[str, str | None]:
    """Component's flag -> the file that is named for it."""
    return {
        component.flag: vae if component.name == "vae" else getattr(options, component.flag, None)
        for component in family.components
        if component.flag
    }


def load(
    family: Family,
    path: str,
    options: FamilyOptions,
    *,
    detect: Detect | None = None,
    vae: str | None = None,
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
    dtype: Dtypes = None,
    later: Collection[str] = (),
    map: bool = True,
    progress: Progress | None = None,
) -> Models:
    """A checkpoint (file, folder or hub id), with the components that the options name files for: `outline`, then
    `read_values`.

    Everything is checked from headers before a value is read.
    """
    models = outline(family, path, options, detect=detect, vae=vae, tokenizer=tokenizer)
    read_values(models, device=device, dtype=dtype, later=later, map=map, progress=progress)
    return models


def read_values(
    models: Models,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtypes = None,
    later: Collection[str] = (),
    map: bool = True,
    progress: Progress | None = None,
) -> None:
    """Give the nets of an `outline` their values; no tensor is in memory twice.

    `dtype`: the number format of denoiser and encoders, one for all or by component; None: as in the file. The VAE is
    in the format of its file unless it is named. `later`: those that get their values by `materialize` or
    `materialize_vae`, if at all.
    `map`: whether tensors that need no change may be backed by the file; False for nets that are used from the CPU's
    memory for as long as a training lasts. `progress`: (done, all) numbers.
    """
    models.dtypes = dtypes = {
        "vae": None,
        **(dtype if isinstance(dtype, Mapping) else dict.fromkeys(models.nets(), dtype)),
    }
    now = {name: weights for name, weights in models.source.components.items() if name not in later}
    done, total = 0, sum(math.prod(shape) for weights in now.values() for shape in weights.shapes().values())

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done, total)

    models.make(now)
    for name, net in models.made().items():
        if name in now:
            now[name].put_into(net, dtypes.get(name), advance, map).to(device)


def merge_when_read(models: Models, changes: Mapping[str, Mapping[str, Change]]) -> None:
    """Have changes (component -> native name -> change) made to weights whenever they are read from their files."""
    found = {name: replace(w, changes=changes.get(name, {})) for name, w in models.source.components.items()}
    models.source = replace(models.source, components=found)


def quantise_when_read(
    models: Models, choices: Mapping[str, str], budget: float | None = None, kernel: str = ""
) -> None:
    """Have the blocks of frozen nets keep their weights in fewer bits, from when they are read. `choices`: component ->
    format; `choices`, `budget`, `kernel`: as of `memory.formats.quantise`."""
    found = dict(models.source.components)
    for name, choice in choices.items():
        blocks = models.family.blocks if name == "denoiser" else models.family.encoder_blocks
        found[name] = replace(found[name], quantise=partial(_quantised, blocks, choice, budget, kernel))
    models.source = replace(models.source, components=found)


def keep_when_read(models: Models, names: Collection[str]) -> None:
    """Have these frozen nets keep what stands in codes in their files so."""
    parts = models.source.components
    found = {n: replace(parts[n], quantise=partial(keep, parts[n].tensors, parts[n].key_format)) for n in names}
    models.source = replace(models.source, components={**parts, **found})


def _quantised(
    blocks: Callable[[nn.Module], Iterable[nn.Module]], choice: str, budget: float | None, kernel: str, net: nn.Module
) -> Mapping[str, Stored]:
    return quantise(net, blocks(net), choice, budget, kernel)


def materialize(models: Models, device: torch.device | str = "cpu") -> None:
    """All text encoders on the device but those that are streamed; those that were left for later get their values."""
    for name, net in models.encoders.items():
        if name in models.streamed:
            continue
        if next(net.parameters()).is_meta:
            models.source.components[name].put_into(net, models.dtypes.get(name))
        net.to(device)


def materialize_vae(models: Models, device: torch.device | str = "cpu") -> nn.Module:
    """The VAE on the device, with its values. Errors: `UserError` where there is none."""
    vae = models.vae
    if next(vae.parameters()).is_meta:
        models.source.components["vae"].put_into(vae, models.dtypes.get("vae"))
    return vae.to(device)


def unload(models: Models) -> None:
    """Give up the memory of text encoders and VAE; `materialize` and `materialize_vae` read them again."""
    for name, net in models.made().items():
        if name != "denoiser":
            drop(net)


def _tokenizer(
    spec: TokenizerSpec, source: Checkpoint, options: FamilyOptions, given: str | None, *, later: bool
) -> Any:
    """The tokenizer given, else the one in the folder or beside the file, else the family's own; `later`: made when it
    is used."""
    if own := getattr(options, spec.flag, None):
        path = locate.local(own, spec.flag)
        folder: Path | None = path / spec.folder if (path / spec.folder).is_dir() else path
    else:
        folder = _tokenizer_folder(spec, source, given)
    return LaterTokenizer(spec.make, folder, folder or spec.home()) if later else spec.make(folder)


def tokenizers_found(family: Family, source: Checkpoint, given: str | None) -> dict[str, Any]:
    """The tokenizers that come with a model's text encoders; the stock ones are not named."""
    folders = {
        name: _tokenizer_folder(spec, source, given)
        for name, spec in family.tokenizer_specs.items()
        if name in source.components
    }
    return {name: family.tokenizer_specs[name].make(folder) for name, folder in folders.items() if folder}


def _tokenizer_folder(spec: TokenizerSpec, source: Checkpoint, given: str | None) -> Path | None:
    if given is not None:
        path = locate.local(given, "tokenizer")
        if (path / spec.folder).is_dir():
            return path / spec.folder
        if spec.alone:
            return path
    beside = (source.path if source.path.is_dir() else source.path.parent) / spec.folder
    return beside if beside.is_dir() else None


def _check_vocabulary(name: str, spec: TokenizerSpec, tokenizer: Any, net: nn.Module) -> None:
    if len(tokenizer) > (rows := spec.rows(net)):
        flag, what = spec.flag or "tokenizer", "the denoiser" if name == "denoiser" else f"the text encoder {name}"
        raise UserError(
            f"{flag}: it has {len(tokenizer)} tokens, {what} only {rows}; give this model's own with {flag}"
        )


def _put_beside(spec: TokenizerSpec, tokenizer: Any, beside: Path) -> None:
    """A vocabulary of its own goes with the file, or it could not be used; CLIP's comes with every program."""
    if not spec.alone or is_stock(tokenizer):
        return
    if not beside.exists():
        with aside_folder(beside) as temp:
            tokenizer.save_pretrained(temp)
        return
    with suppress(UserError):  # of a folder that this model's class does not read
        if spec.make(beside).get_vocab() == tokenizer.get_vocab():
            return
    raise UserError(f"{beside}: another model's tokenizer stands where this model's must; choose another output_dir")


def save(
    models: Models,
    path: Path,
    *,
    layout: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    state: Mapping[str, Mapping[str, Writable]] | None = None,
    trained: Collection[str] = (),
    progress: Progress | None = None,
    finish: Callable[[dict[str, Writable]], dict[str, Writable]] = lambda tensors: tensors,
) -> None:
    """Write a whole model, laid out as "single_file" or "diffusers".

    `state`: {component: native tensors} to write in place of the nets' own (an average, say). A component that is as it
    was read is written in its first number format, not as it was run in, and one tensor after another. `trained`:
    components that changed; such an encoder that has no place in the single file is written beside it, as
    `NAME_ENCODER`. `progress`: (done, all) bytes. `finish`: a last change to a single file's tensors.
    """
    source = models.source
    source.check()
    beside = {n for n in trained if layout == "single_file" and source.components[n].prefix is None}
    wanted = {
        n
        for n, weights in source.components.items()
        if layout == "diffusers" or weights.prefix is not None or n in beside
    }
    made = models.made()
    each = {name: weights for name, weights in source.components.items() if name in wanted}
    values = {
        name: saving.values(made.get(name), weights, (state or {}).get(name, {}), dtype)
        for name, weights in each.items()
    }
    values = {name: files.finite(tensors, f"{path.name} ({name})", dtype) for name, tensors in values.items()}
    if layout == "diffusers":
        _write_folder(models, path, values, metadata, progress)
        return
    for name, spec in models.family.tokenizer_specs.items():
        if name in values and name in models.tokenizers:
            _put_beside(spec, models.tokenizers[name], path.parent / spec.folder)
    for name in beside:
        weights = source.components[name]
        files.save(
            path.with_name(f"{path.stem}_{name}{path.suffix}"), weights.key_format.write(values.pop(name)), metadata
        )
    files.save(
        path,
        finish(models.family.adjust_single_file(models, saving.single_file(source, values))),
        metadata,
        source.check,
        progress,
    )


# --- folders ---


def check_folder(models: Models) -> None:
    """Errors: `UserError` if the model cannot be saved as a diffusers folder."""
    if models.family.new_folder is None and models.source.layout != "diffusers":
        raise UserError(
            f"save_model_as: {models.family.title} is saved as a diffusers folder only if it came as one; choose "
            "safetensors"
        )


def _write_folder(
    models: Models,
    path: Path,
    values: Mapping[str, Mapping[str, Writable]],
    metadata: Mapping[str, str],
    progress: Progress | None,
) -> None:
    """A folder that diffusers' pipeline reads; it appears whole or not at all."""
    check_folder(models)
    source, before = models.source, 0
    carried = {name: source.components[name].carried() for name in values}
    total = sum(t.nbytes for held in (values, carried) for tensors in held.values() for t in tensors.values())
    with aside_folder(path, total) as folder:
        made = models.family.new_folder(models) if models.family.new_folder else None
        if made is None:
            _copy_facts(source.path, folder)
        else:
            _json(folder / made.index_name, made.index)
            _json(folder / "scheduler" / "scheduler_config.json", made.scheduler)
            for name, content in made.files.items():
                _json(folder / name, content)
            for encoder, tokenizer in models.tokenizers.items():
                tokenizer.save_pretrained(folder / models.family.tokenizer_specs[encoder].folder)
        for name, tensors in values.items():
            weights = source.components[name]
            if made is not None:
                tensors = {**tensors, **made.added.get(name, {})}
                for part, key in {weights.component.folder: name, **{n: n for n in weights.component.beside}}.items():
                    _json(folder / part / "config.json", made.configs[key])
            written = {**weights.component.diffusers(shapes(tensors)).write(tensors), **carried[name]}
            file = "model" if name in models.encoders else "diffusion_pytorch_model"
            for part, held in saving.by_folder(weights.component, written).items():
                advance = partial(_advance, progress, before, total) if progress else None
                # Readers of such folders ask for the mark "pt".
                files.save(folder / part / f"{file}.safetensors", held, {**metadata, "format": "pt"}, progress=advance)
                before += sum(t.nbytes for t in held.values())
        source.check()


def _advance(progress: Progress, before: int, total: int, done: int, of_file: int) -> None:
    """Progress of one file of several."""
    progress(before + done, total)


def _copy_facts(source: Path, folder: Path) -> None:
    """All of a folder but its weights: configs, tokenizers, the scheduler."""
    for path in sorted(source.rglob("*")):
        if path.suffix in (".json", ".txt", ".model", ".jinja") and ".index." not in path.name:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _json(path: Path, content: Mapping[str, Any]) -> None:
    files.write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
