"""An adapter file read without its model: the usual models of its family, or the header of the one given, name the
layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato import families
from sfumato.adapters import files as adapter_files
from sfumato.adapters import from_tensors
from sfumato.adapters.base import Adapter
from sfumato.errors import Mistakes, UserError, nearest
from sfumato.families import detect
from sfumato.formats import adapter_metadata, files
from sfumato.formats.adapter_check import check_adapter
from sfumato.formats.clients import WORDS
from sfumato.formats.dialect import ALPHA, DOWN, UP, AdapterTensors, Dialect, ModulePath
from sfumato.formats.names import Rule
from sfumato.formats.planned import Writable
from sfumato.formats.spellings import Spellings
from sfumato.models import locate, reference
from sfumato.models.base import Family
from sfumato.models.components import Checkpoint
from sfumato.models.detection import Shapes, has
from sfumato.tools import checkpoints

WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What a folder that PEFT or diffusers saved holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The layers of a model and their names, without values."""

    family: Family
    variant: str
    layers: Mapping[ModulePath, tuple[int, ...]]
    """Layer -> shape of its weight."""
    dialects: Mapping[str, Dialect]
    spellings: Spellings
    """The layers by every name that programs give them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter file as it was read."""

    path: Path
    outline: Outline
    state: dict[ModulePath, AdapterTensors]
    """In native names and kohya's leaves, in the order of the nets."""
    metadata: dict[str, str]
    words: dict[str, Tensor] = field(default_factory=dict)
    """The tensors of words that are kept beside the adapter (textual inversion)."""

    @property
    def kinds(self) -> set[str]:
        """The kinds of its adapters, by class."""
        return {from_tensors(tensors)[0].__name__ for tensors in self.state.values()}


Inexact = Callable[[ModulePath, Mapping[int, AdapterTensors], Rule, tuple[int, ...]], AdapterTensors]
"""As in `adapters/files.py`, with the shape of the layer's weight."""


def read(
    path: str | Path, *, family: str | None = None, model: str | None = None, inexact: Inexact | None = None
) -> AdapterFile:
    """An adapter file, or a folder of PEFT's or diffusers' with one, in whatever names.

    `family`: of its model, where the file does not show it. `model`: a checkpoint of other sizes than the family's
    usual models; its header alone is read. `inexact`: as `adapters.files.read`. Errors: `UserError` for what is no
    adapter, for keys that name no layer and for shapes that do not fit.
    """
    file, tensors, metadata, words = _opened(path)
    outline, state = _fitting(file, tensors, _outlines(file, tensors, metadata, family, model), inexact)
    return AdapterFile(path=file, outline=outline, state=state, metadata=metadata, words=words)


def read_like(path: str | Path, outline: Outline) -> tuple[AdapterFile, list[str]]:
    """An adapter file as one for the same model, whatever its shapes; and the keys that name no layer of it."""
    file, tensors, metadata, words = _opened(path)
    strange = [key for key, named in outline.spellings.claimed(tensors) if named is None]
    claimed = {key: t for key, t in tensors.items() if key not in set(strange)}
    state = adapter_files.read_as(outline.spellings, claimed)
    return AdapterFile(path=file, outline=outline, state=state, metadata=metadata, words=words), strange


def _opened(path: str | Path) -> tuple[Path, dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """(file, tensors of layers, metadata, tensors of words)"""
    file = _file(Path(path).expanduser())
    header = files.read_header(file)
    found = detect.identify({name: info.shape for name, info in header.tensors.items()}, header.metadata)
    if found and found.kind != "adapter":
        what = detect.CALLED.get(found.kind, "a base model").partition(",")[0]
        raise UserError(f"{file} is {what}, not an adapter (such as a LoRA)")
    tensors, metadata = adapter_metadata.load(file)
    check_adapter(tensors, str(file))
    words = {key: t for key, t in tensors.items() if key.startswith(WORDS)}
    return file, {key: t for key, t in tensors.items() if key not in words}, metadata, words


def adapter_of(path: ModulePath, tensors: AdapterTensors, weight: Tensor) -> Adapter:
    """The adapter of a layer with this weight, with these values in fp32. Errors: `UserError` if they do not fit."""
    kind, options = from_tensors(tensors)
    adapter = kind(_layer(weight), options, torch.Generator())
    adapter.name = ".".join(path)
    adapter.load_tensors(tensors)
    return adapter.requires_grad_(False).eval()


def as_lora(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> AdapterTensors:
    """The LoRA of scale 1 whose change is `up @ down`, (m, r) and (r, n), on a layer whose weight has this shape."""
    rank, ones = len(down), [1] * (len(shape) - 2)
    return {
        DOWN: down.reshape(rank, *shape[1:]).cpu().contiguous(),
        UP: up.reshape(shape[0], rank, *ones).cpu().contiguous(),
        ALPHA: torch.tensor(float(rank)),
    }


def _layer(weight: Tensor) -> nn.Module:
    """A layer with this weight."""
    out, channels, *kernel = weight.shape
    layer: nn.Linear | nn.Conv2d
    if kernel:
        padding = (kernel[0] // 2, kernel[1] // 2)
        layer = nn.Conv2d(channels, out, (kernel[0], kernel[1]), padding=padding, device="meta")
    else:
        layer = nn.Linear(channels, out, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(torch.zeros(out, device=weight.device), requires_grad=False)
    return layer


def open_checkpoint(path: str | Path, flag: str) -> tuple[Family, Checkpoint]:
    """A checkpoint's family, and its components as far as it holds them; headers are read and nothing else. Errors:
    `UserError` for what is none."""
    models = checkpoints.open_parts(locate.local(str(path), flag), {})
    return models.family, models.source


def weights(model: str | Path) -> dict[ModulePath, Writable]:
    """The weights of a checkpoint's layers, each read when it is asked for. Errors: as `open_checkpoint`."""
    _, source = open_checkpoint(model, "--model")
    return {
        (part, name.removesuffix(".weight")): tensor
        for part, held in source.components.items()
        if part != "vae"
        for name, tensor in held.planned().items()
        if name.endswith(".weight")
    }


# --- which model it is for ---


def usual_outlines(family: str) -> list[Outline]:
    """The usual models of a family."""
    return [_usual(family, variant) for variant in reference.usual_models(_folder(family))]


@cache
def _usual(family: str, variant: str) -> Outline:
    return _outline(families.family(family), variant, reference.usual_models(_folder(family))[variant])


def _outline(family: Family, variant: str, parts: Mapping[str, Shapes]) -> Outline:
    layers, dialects = reference.layers(parts), reference.dialects(family, parts)
    return Outline(
        family=family,
        variant=variant,
        layers=layers,
        dialects=dialects,
        spellings=Spellings(dialects.values(), layers),
    )


def _folder(family: str) -> Path:
    return Path(families.__file__).parent / family


def _outlines(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: str | None, model: str | None
) -> list[Outline]:
    """The models that an adapter may be for, those that it most likely is for first."""
    if family is not None and family not in families.names():
        raise UserError(
            f"--family {family}: known are {', '.join(families.names())}{nearest(family, families.names())}"
        )
    if model is not None:
        theirs, source = open_checkpoint(model, "--model")
        if family not in (None, theirs.name):
            raise UserError(f"--family {family}: {model} is of the family {theirs.name}")
        usual = next(iter(reference.usual_models(_folder(theirs.name)).values()), {})
        parts = {name: weights.shapes() for name, weights in source.components.items() if name != "vae"}
        return [_outline(theirs, Path(model).name, {**usual, **parts})]
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    detected = detect.identify(shapes, metadata)
    family = family or (detected.family if detected else None)
    if family is None:
        return _by_names(file, shapes, tensors, metadata)
    if not (outlines := usual_outlines(family)):
        raise UserError(
            f"{file}: the layers of {families.family(family).title} must be read from a checkpoint: --model"
        )
    return outlines


def _by_names(file: Path, shapes: Shapes, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Outline]:
    """The models of the one family whose layers an adapter names.

    Several may have such layers: then it is that to which it belongs in kohya's names, which each family knows.
    """
    fits: dict[str, Outline] = {}
    for outline in (outline for name in families.names() for outline in usual_outlines(name)):
        name = outline.family.name
        if name in fits or _unclaimed(tensors, outline):
            continue
        with suppress(UserError):
            state = _read(tensors, outline)
            fits[name] = outline
            kohya = {k: tuple(t.shape) for k, t in adapter_files.write(outline.dialects["kohya"], state).items()}
            found = detect.identify(kohya, metadata)
            if found and found.family == name:
                return [outline]
    if len(fits) == 1:
        return list(fits.values())
    if fits:
        raise UserError(f"{file}: its layers may be those of {' or '.join(fits)}; say which with --family")
    known = any(has(shapes, pattern) for pattern in detect.FUTURE.values())
    cure = "" if known else "; if it is an adapter for a model of other sizes than usual, give the model with --model"
    raise UserError(f"{file} is {detect.unknown(shapes)}{cure}")


def _unclaimed(tensors: Mapping[str, Tensor], outline: Outline) -> int:
    """How many keys name no layer of a model."""
    return sum(named is None for _, named in outline.spellings.claimed(tensors))


def _read(
    tensors: Mapping[str, Tensor], outline: Outline, inexact: Inexact | None = None
) -> dict[ModulePath, AdapterTensors]:
    """Errors: `UserError` if names or shapes do not fit."""

    def near(path: ModulePath, pieces: Mapping[int, AdapterTensors], rule: Rule) -> AdapterTensors:
        assert inexact is not None
        return inexact(path, pieces, rule, outline.layers[path])

    state = adapter_files.read_as(outline.spellings, tensors, near if inexact else None)
    _check_shapes(state, outline)
    return state


def _fitting(
    file: Path, tensors: Mapping[str, Tensor], outlines: list[Outline], inexact: Inexact | None
) -> tuple[Outline, dict[ModulePath, AdapterTensors]]:
    """The first outline whose names and shapes an adapter fits. Errors: what that says which fits best."""
    mistakes = Mistakes()
    unclaimed = [_unclaimed(tensors, outline) for outline in outlines]
    for outline in (o for o, n in zip(outlines, unclaimed, strict=True) if n == min(unclaimed)):
        with mistakes:
            return outline, _read(tensors, outline, inexact)
    title = f"{outlines[0].family.title} ({', '.join(o.variant for o in outlines)})"
    raise UserError(
        *dict.fromkeys(f"{file}: {message}" for message in mistakes.messages[:5]),
        f"{file}: it was read as an adapter for {title}; if it is for a model of other sizes, give that with "
        "--model, or where adapters are merged into one with --layers_of",
    )


def _check_shapes(state: Mapping[ModulePath, AdapterTensors], outline: Outline) -> None:
    """Errors: one `UserError` for layers whose tensors do not fit."""
    wrong: list[str] = []
    for path, tensors in state.items():
        try:
            adapter_of(path, tensors, torch.empty(outline.layers[path], device="meta"))
        except UserError as error:
            wrong += error.messages
    if wrong:
        raise UserError(*wrong[:5], *([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []))


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} is a folder without {' or '.join(WEIGHTS)}: expected an adapter file")
