"""Adapters from one program's names to another's: the same effect, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sfumato import families
from sfumato.adapters import files as adapter_files
from sfumato.data.store import Progress
from sfumato.errors import Mistakes, UserError
from sfumato.formats import files
from sfumato.formats.adapter_metadata import DIFFUSERS_CONFIG
from sfumato.formats.clients import loads_in
from sfumato.formats.dialect import ALIASES, ALPHA, AdapterTensors, Dialect, ModulePath, check_dialect
from sfumato.formats.metadata import hashes
from sfumato.formats.names import Rule
from sfumato.formats.planned import made
from sfumato.tensors.low_rank import truncated
from sfumato.tools import adapter_file
from sfumato.tools.adapter_file import AdapterFile
from sfumato.tools.written import check_output_file, check_rank

DTYPES = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written, and how near it is."""

    family: str
    variant: str
    kinds: tuple[str, ...]
    layers: int
    keys_in: int
    keys_out: int
    left_out: Mapping[str, str]
    """Keys that belong to no adapter -> what they are; they are not in the new file."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Layers that have no exact form there -> Frobenius norm of what their change lacks, as a share of it."""
    approximated: int = 0
    """Layers that became the nearest LoRA, with or without an error."""
    dialect: str = ""
    loads_in: tuple[str, ...] = ()
    """What each program loads of the new file, a line each."""

    def text(self, path: Path) -> str:
        """For a reader; `path`: of the new file."""
        first = f"{path}: {self.layers:,} layers ({', '.join(self.kinds)}) of {self.family} in {self.dialect} names"
        if self.approximated:
            most = max(self.errors.values(), default=0.0)
            first += f"; {self.approximated:,} are the nearest LoRA, which lacks {most:.1%} of a layer's change at most"
        left_out = (f"  left out: {key}: {what}" for key, what in self.left_out.items())
        return "\n".join([first, *left_out, *(f"  {line}" for line in self.loads_in)])


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    family: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write the adapter `source` under the names of the dialect `to` ("kohya", "comfy", "diffusers", "lycoris").

    `family`, `model`: as `adapter_file.read`. `dtype`: "fp16", "bf16" or "float"; None: as in the file. `rank`: a layer
    without an exact form there becomes a LoRA of this rank, the nearest there is; None: it is refused. Errors:
    `UserError`, and nothing is written.
    """
    path, dialect_name = Path(target).expanduser(), ALIASES.get(to, to)
    check_dialect(to)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    check_rank(rank)
    check_output_file(path, Path(source).expanduser())
    nearest_lora = None if rank is None else Nearest(rank, model)
    read = adapter_file.read(source, family=family, model=model, inexact=nearest_lora.joined if nearest_lora else None)
    dialect = read.outline.dialects[dialect_name]
    apart = read.words if dialect_name == "peft" else {}
    tensors = _written(read, dialect, nearest_lora, progress) | ({} if apart else read.words)
    if dtype is not None:
        tensors = {name: _cast(name, t, DTYPES[dtype]) for name, t in tensors.items()}
    files.check_finite(tensors, f"the adapter {path.name}", DTYPES[dtype] if dtype else None)
    # Its alphas stand in the tensors now.
    metadata = {key: value for key, value in read.metadata.items() if key != DIFFUSERS_CONFIG}
    files.save(path, tensors, {**metadata, **hashes(tensors, metadata)})
    return Converted(
        family=read.outline.family.name,
        variant=read.outline.variant,
        kinds=tuple(sorted(read.kinds)),
        layers=len(read.state),
        keys_in=len(files.read_header(read.path).tensors),
        keys_out=len(tensors),
        left_out=dict.fromkeys(apart, "a word beside the adapter, for which diffusers refuses a file"),
        errors=nearest_lora.errors if nearest_lora else {},
        approximated=nearest_lora.layers if nearest_lora else 0,
        dialect=to,
        loads_in=tuple(
            of.text("--to {}")
            for of in loads_in(
                {name: tuple(t.shape) for name, t in tensors.items()},
                families.facts(read.outline.family.name).loads_in,
            )
        ),
    )


def _written(
    read: AdapterFile, dialect: Dialect, nearest_lora: Nearest | None, progress: Progress
) -> dict[str, Tensor]:
    """The tensors under the dialect's names. Errors: one `UserError` for all layers that it cannot hold."""
    out: dict[str, Tensor] = {}
    mistakes = Mistakes()
    if homeless := sorted({component for component, _ in read.state} - dialect.prefix.keys()):
        raise UserError(
            f"{dialect.name} names have no place for layers of {', '.join(homeless)}, they hold "
            f"{', '.join(dialect.prefix)}: choose other names with --to, or train without them "
            "(network_train_unet_only)"
        )
    for i, (path, tensors) in enumerate(read.state.items()):
        progress(i, len(read.state))
        try:
            new = adapter_files.write(dialect, {path: tensors})
        except UserError as error:
            if nearest_lora is None or not dialect.holds(path):
                mistakes.messages += error.messages
                continue
            new = adapter_files.write(dialect, {path: nearest_lora(path, tensors, read.outline.layers[path])})
        if twice := out.keys() & new.keys():
            raise UserError(f"two layers share the {dialect.name} name {min(twice)!r}")
        out |= new
    if mistakes.messages:
        raise UserError(*_summed(mistakes.messages, dialect))
    return out


def _summed(messages: list[str], dialect: Dialect) -> list[str]:
    """The messages, those that say the same of several layers once."""
    reasons: dict[str, list[str]] = {}
    for message in messages:
        name, _, reason = message.partition(": ")
        reasons.setdefault(reason or message, []).append(name)
    return [
        f"{len(names)} layers have no exact form in {dialect.name} names, such as {names[0]}: {reason}"
        for reason, names in reasons.items()
    ] + ["with --rank N they become LoRA of that rank, the nearest there is, and the error is stated"]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Alphas stay as they are: they cost nothing."""
    return tensor if name.endswith(f".{ALPHA}") or not tensor.is_floating_point() else tensor.to(dtype)


class Nearest:
    """The nearest LoRA of a rank to a layer's change; `errors` has what each lacks."""

    def __init__(self, rank: int, model: str | None = None) -> None:
        """`model`: the checkpoint, for kinds that act on a layer's own weight."""
        self.rank = rank
        self.errors: dict[str, float] = {}
        self.layers = 0
        """How many were made."""
        self._weights = adapter_file.weights(model) if model else {}
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, path: ModulePath, tensors: AdapterTensors, shape: tuple[int, ...]) -> AdapterTensors:
        """Errors: `UserError` for a change that depends on the layer's weight, without the model."""
        weight = self._weight(path, shape)
        return self._lora(path, change(path, tensors, weight, known=path in self._weights))

    def joined(
        self, path: ModulePath, pieces: Mapping[int, AdapterTensors], rule: Rule, shape: tuple[int, ...]
    ) -> AdapterTensors:
        """Of a fused layer, from the tensors of its pieces; one that is missing changes nothing."""
        rows = rule.rows or (shape[0] // len(rule.foreign),) * len(rule.foreign)
        weights = torch.split(self._weight(path, shape), list(rows))
        parts = [
            change(path, pieces[i], weight, known=path in self._weights) if i in pieces else torch.zeros(weight.shape)
            for i, weight in enumerate(weights)
        ]
        return self._lora(path, torch.cat(parts))

    def _weight(self, path: ModulePath, shape: tuple[int, ...]) -> Tensor:
        return made(self._weights[path]).float() if path in self._weights else torch.zeros(shape)

    def _lora(self, path: ModulePath, delta: Tensor) -> AdapterTensors:
        self.layers += 1
        found = truncated(delta.flatten(1), self.rank, self._generator)
        if found.error:
            self.errors[".".join(path)] = found.error
        return adapter_file.as_lora(found.up, found.down, tuple(delta.shape))


def change(path: ModulePath, tensors: AdapterTensors, weight: Tensor, *, known: bool = False) -> Tensor:
    """What an adapter adds to a layer's weight, fp32. `known`: whether that is the layer's own, and not a stand-in of
    its shape. Errors: `UserError` if it depends on the weight and that is not known."""
    adapter = adapter_file.adapter_of(path, tensors, weight)
    if adapter.needs_weight() and not known:
        raise UserError(
            f"{'.'.join(path)}: {type(adapter).__name__} acts on the layer's own weight; for a LoRA near to that, give "
            "the model with --model"
        )
    return adapter.delta_weight(weight)
