"""The nets of a model on their way into files: whose values are written, and under which names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sfumato.formats.lazy import Lazy
from sfumato.formats.names import add_prefix
from sfumato.formats.planned import PlannedTensor, Writable, made
from sfumato.models.components import Checkpoint, Component, ComponentWeights
from sfumato.models.meta_init import shapes


def by_folder(component: Component, tensors: Mapping[str, Writable]) -> dict[str, dict[str, Writable]]:
    """Tensors in a diffusers folder's key format -> the folder that each stands in, and its name there."""
    out: dict[str, dict[str, Writable]] = {component.folder: {}, **{folder: {} for folder in component.beside}}
    for name, tensor in tensors.items():
        starts = ((folder, prefix) for folder, prefix in component.beside.items() if name.startswith(prefix))
        folder, prefix = next(starts, (component.folder, ""))
        out[folder][name[len(prefix) :]] = tensor
    return out


def values(
    net: nn.Module | None, weights: ComponentWeights, instead: Mapping[str, Writable], dtype: torch.dtype | None
) -> dict[str, Writable]:
    """Native tensors of a net as they are saved: those of the file, in its number formats (fp8 as bf16), where the net
    has their values or was never given any (None: was not even made)."""
    own: dict[str, Writable] = {**(net.state_dict() if net else {}), **instead}
    if not own or any(isinstance(t, Tensor) and t.is_meta for t in own.values()):
        own = {**weights.planned(dtype), **instead}
    elif not any(isinstance(t, PlannedTensor) for t in own.values()) and unchanged(own, weights):
        own = weights.planned(dtype)
    return own if dtype is None else {name: t.to(dtype) if t.dtype.is_floating_point else t for name, t in own.items()}


def unchanged(own: Mapping[str, Writable], weights: ComponentWeights) -> bool:
    """Whether tensors are those of the file, with what is merged into them, but for their number format."""
    formats = {t.dtype for t in own.values()}
    # Read anew: a net that was trained in the file's own format may share its memory with what was mapped before.
    read = weights.natives(formats.pop() if len(formats) == 1 else None, map=False)
    return all(torch.equal(made(own[name]).cpu(), t.to(own[name].dtype)) for name, t in read)


def single_file(source: Checkpoint, components: Mapping[str, Mapping[str, Writable]]) -> dict[str, Writable]:
    """The tensors of a single file in the key format of the source, or of new ones. `components`: native tensors
    by component."""
    out: dict[str, Writable] = {}
    tied: dict[str, Writable] = {}
    for name, tensors in components.items():
        weights = source.components[name]
        if weights.prefix is None:
            continue
        key_format, carried = weights.key_format, dict[str, Writable]()
        if weights.alone or source.path.is_dir():
            key_format, carried = weights.component.single(shapes(tensors)), weights.carried()
        out |= add_prefix({**key_format.write(tensors), **carried}, weights.prefix)
        pairs = [
            (weights.prefix + copy, weights.prefix + original) for copy, original in weights.component.tied_keys.items()
        ]
        tied |= {copy: out[original] for copy, original in pairs if copy in source.passthrough and original in out}
    passthrough = source.passthrough
    return {**out, **(passthrough.as_stored() if isinstance(passthrough, Lazy) else passthrough), **tied}
