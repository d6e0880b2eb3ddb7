"""An adapter file for a model: read in any dialect of its family, or refused as what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from sfumato.adapters import files as adapter_files
from sfumato.errors import UserError
from sfumato.families.detect import CALLED, identify
from sfumato.formats import adapter_metadata, dialect
from sfumato.formats.adapter_check import check_adapter
from sfumato.models.base import Models
from sfumato.models.embedding_files import without_words


def read_adapter(
    models: Models, path: Path, flag: str = "adapter", *, skip: Callable[[str], bool] = lambda key: False
) -> dict[dialect.ModulePath, dialect.AdapterTensors]:
    """An adapter file in any dialect of the family -> {path: tensors}; words that are kept in it are passed over.
    `flag`: what named it, for messages; `skip`: whether a key is not asked for.

    Errors: `UserError` for keys that name no layer, and for tensors that no adapter can have.
    """
    tensors, _ = adapter_metadata.load(path)
    by_path = [
        (name, p)
        for name, net in models.nets().items()
        for p, layer in net.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    try:
        check_adapter(tensors, f"{flag} {path}")
        wanted = {key: t for key, t in without_words(tensors).items() if not skip(key)}
        return adapter_files.read(models.dialects.values(), wanted, by_path)
    except UserError as error:
        if kind := _other_kind(tensors):
            raise UserError(f"{flag} {path} is {kind}, not an adapter (such as a LoRA)") from error
        raise


def _other_kind(tensors: Mapping[str, Tensor]) -> str:
    """What a file is that is not an adapter, where that is known."""
    found = identify({name: tuple(t.shape) for name, t in tensors.items()})
    if found is None or found.kind == "adapter":
        return ""
    return CALLED.get(found.kind, "a base model").partition(",")[0]
