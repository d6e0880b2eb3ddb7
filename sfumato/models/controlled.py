"""Control nets at work: made anew, read, written, and put onto a denoiser from outside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.formats.folders import aside_folder
from sfumato.formats.names import add_prefix
from sfumato.models import lllites
from sfumato.models.base import Models
from sfumato.models.components import open_component
from sfumato.models.control import FLAG, ControlSpec, Door, Follower, Residuals
from sfumato.models.detection import Shapes
from sfumato.models.meta_init import fill, shapes


class Controlled:
    """A control net at work on a denoiser: a `Follower`. The denoiser's code knows nothing of it."""

    def __init__(self, models: Models, net: nn.Module, strength: float = 1.0) -> None:
        """Errors: `UserError` if the net is not for this denoiser."""
        spec = spec_of(models)
        self.models, self.net, self.strength, self._spec = models, net, strength, spec
        self.blocks, self.takes_latents = spec.blocks(net), spec.takes_latents(net)
        self._hint: Tensor | None = None
        self._residuals: Residuals = ()
        doors = spec.doors(models.denoiser, net)
        self._handles = [
            models.denoiser.register_forward_pre_hook(self._run, with_kwargs=True),
            models.denoiser.register_forward_hook(self._forget, always_call=True),
            *(self._open(door) for door in doors),
        ]

    def follow(self, images: Tensor | None) -> None:
        if images is not None and self.takes_latents:
            images = self.models.scaled(self.models.encode_images(2 * images - 1))
        self._hint = images

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _run(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._hint is None or not self.strength:
            return
        x = args[0]
        # A sampler asks for all predictions with negative prompts and all with prompts at once.
        hint = self._hint.to(x.device, x.dtype).repeat(len(x) // len(self._hint), 1, *[1] * (self._hint.ndim - 2))
        self._residuals = self.net(*self._spec.arguments(denoiser, args), hint=hint, **kwargs)

    def _forget(self, *_: object) -> None:
        self._residuals = ()

    def _open(self, door: Door) -> torch.utils.hooks.RemovableHandle:
        def add(value: Any) -> Any:
            if not self._residuals:
                return value
            return door.add(value, self._residuals[door.residual] * self.strength)

        if door.before:
            return door.module.register_forward_pre_hook(lambda module, args: add(args))
        return door.module.register_forward_hook(lambda module, args, output: add(output))


def follow_by(models: Models, name: str, strength: float = 1.0, dtype: torch.dtype | None = None) -> Follower:
    """Have a model follow images by what a file, a folder or the hub holds. Errors: `UserError` if it is for another
    model."""
    follower: Follower
    if lllites.is_lite(name):
        outline = next(models.denoiser.parameters()).is_meta
        small = lllites.read_net(models, Path(name).expanduser(), outline=outline)
        follower = lllites.Lite(models, small.to(dtype), strength)
    else:
        follower = Controlled(models, read_net(models, name, dtype), strength)
    models.followers.append(follower)
    return follower


def spec_of(models: Models) -> ControlSpec:
    """Of the model's family. Errors: `UserError` if it has no control nets."""
    if models.family.control is None:
        raise UserError(f"{models.family.title}: ControlNets are not supported for this model")
    return models.family.control


def new_net(models: Models, generator: torch.Generator) -> nn.Module:
    """A control net that changes nothing yet, in fp32; without values (on the meta device) if the denoiser is."""
    spec = spec_of(models)
    net = spec.component.net(spec.shapes(denoiser_shapes(models), models.options), {})
    if is_outline(models):
        return net
    known = dict(_denoiser_values(models, net.state_dict().keys()))
    zero = spec.zero(shapes(net.state_dict()))
    return fill(net, dict(_first_values(net, zero, known, generator)), spec.component.title)


def is_outline(models: Models) -> bool:
    """Whether the denoiser has no values."""
    return next(models.denoiser.parameters()).is_meta


def denoiser_shapes(models: Models) -> Shapes:
    """Of the denoiser's weights by name, in however few bits they are kept."""
    weights = models.source.components.get("denoiser")
    return weights.shapes() if weights else shapes(models.denoiser.state_dict())


def _denoiser_values(models: Models, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Those of the denoiser's tensors that have these names, in fp32: as its file has them, which may be more exactly
    than it is run."""
    weights = models.source.components.get("denoiser")
    if weights is None:  # a model made in memory
        own = models.denoiser.state_dict()
        yield from ((name, own[name].float().clone()) for name in names if name in own)
        return
    wanted = weights.shapes().keys() & set(names)
    yield from ((n, t) for n, t in weights.part(wanted).natives(torch.float32, map=False) if n in wanted)


def _first_values(
    net: nn.Module, zero: str, known: Mapping[str, Tensor], generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """A new net's tensors; those that are neither zeros nor `known` are drawn as torch's own layers do."""
    wanted = net.state_dict()
    for name, t in wanted.items():
        if re.fullmatch(zero, name):
            yield name, torch.zeros(t.shape)
        elif name in known:
            yield name, known[name]
        else:
            weight = wanted[f"{name.rpartition('.')[0]}.weight"]
            bound = 1 / math.sqrt(weight[0].numel())
            yield name, torch.empty(t.shape).uniform_(-bound, bound, generator=generator)


def read_net(models: Models, name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The control net of a file, a folder or the hub, frozen; without values (on the meta device) if the denoiser is.
    Errors: `UserError` for one of another kind, for another model, or that does not fit its net."""
    weights = open_component(spec_of(models).component, name)
    found, wanted = weights.shapes(), denoiser_shapes(models)
    for key in found.keys() & wanted.keys():
        if key.endswith(".weight") and found[key] != wanted[key]:
            raise UserError(
                f"{FLAG}: {weights.where} is for another model than {models.source.path}: its {key} is {found[key]}, "
                f"the model's {wanted[key]}"
            )
    return weights.empty() if is_outline(models) else weights.build(dtype, map=False)


def save_net(models: Models, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a control net's native tensors as a single file."""
    spec = spec_of(models)
    written = spec.component.single(shapes(tensors)).write(tensors)
    files.save(path, add_prefix(written, spec.component.prefixes[0]), metadata)


def save_folder(models: Models, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a control net's native tensors as a folder that diffusers reads; it appears whole or not at all."""
    spec, found = spec_of(models), shapes(tensors)
    with aside_folder(path, sum(t.nbytes for t in tensors.values())) as folder:
        files.write_text(folder / "config.json", json.dumps(spec.config(found), indent=2, sort_keys=True) + "\n")
        file = folder / "diffusion_pytorch_model.safetensors"
        files.save(file, spec.component.diffusers(found).write(tensors), {**metadata, "format": "pt"})
