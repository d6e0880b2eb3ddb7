"""ControlNet-LLLites at work: made anew, read, written, and put onto a denoiser from outside."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.errors import UserError, nearest
from sfumato.formats import files
from sfumato.models.base import Models
from sfumato.models.detection import Shapes
from sfumato.models.lllite import LiteNet, LiteSpec, Part
from sfumato.models.meta_init import check, fill, shapes
from sfumato.tensors.random import generator
from sfumato.tensors.shapes import per_sample

TITLE = "the ControlNet-LLLite"


class Lite:
    """A net at work on a denoiser, from outside: a `Follower`."""

    blocks: Sequence[nn.Module] = ()
    """None are large enough to be recomputed or swapped by themselves."""
    takes_latents = False

    def __init__(self, models: Models, net: LiteNet, strength: float = 1.0) -> None:
        """Errors: `UserError` if the net is not for this denoiser."""
        self.net: nn.Module = net
        self.strength, self._hint_of = strength, net.hint
        self.multiplier: Tensor | None = None
        """(b,) strength on each of the samples, times `strength`."""
        self.drop: Callable[[str, Tensor], Tensor] | None = None
        """(path of a layer, what is inside the net there) -> what is left of it."""
        self.apart = False
        """Whether gradients end at the hint, which all parts share: for blocks that are traced one by one."""
        self._images: Tensor | None = None
        self._hint: Tensor | None = None
        self._seen: Tensor | None = None
        """The hint with what it was made by."""
        self.parts = at_layers(models, net)
        """Path of a layer -> what stands there."""
        self._handles = [models.denoiser.register_forward_pre_hook(self._look)]
        for path, part in self.parts.items():
            layer = models.denoiser.get_submodule(path)
            self._handles.append(layer.register_forward_pre_hook(self._at(path, part)))

    def follow(self, images: Tensor | None) -> None:
        """The images (b, 3, H, W) in [0, 1] of the samples to come, or of every b-th of them; None: it does nothing."""
        self._images = None if images is None else images * 2 - 1
        self._hint = self._seen = None

    def remove(self) -> None:
        """The denoiser is again as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def backward(self) -> None:
        """What `apart` leaves out of a backward pass, without values."""
        if self._seen is not None and self._seen.requires_grad:
            torch.autograd.backward(self._seen, torch.empty_like(self._seen))

    def _look(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        # Before the blocks: what is recomputed in the backward pass finds the same hint.
        if self._images is not None and self.strength != 0:
            self._seen = self._hint_of(_as(self._images.to(args[0].device), self.net))
            self._hint = self._seen.detach() if self.apart else self._seen

    def _at(self, path: str, part: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._hint is None or self.strength == 0:
                return None
            return self._changed(args[0], path, part), *args[1:]

        return hook

    def _changed(self, x: Tensor, path: str, part: nn.Module) -> Tensor:
        """x with the part's change; a sampler asks for all predictions with negative prompts and all with prompts at
        once."""
        assert self._hint is not None
        hint, times = self._hint, len(x) // len(self._hint)
        if times > 1:
            hint = hint.repeat(times, *[1] * (hint.ndim - 1))
        change = cast(Part, part)(_as(x, part), hint, lambda m: m if self.drop is None else self.drop(path, m))
        if self.multiplier is not None:
            change = change * per_sample(self.multiplier, change).to(change.dtype)
        return torch.add(x, change.to(x.dtype), alpha=self.strength)


def _as(x: Tensor, part: nn.Module) -> Tensor:
    """In the number format of a part; under autocast as it is, for autocast casts both."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(next(part.parameters()).dtype)


def spec_of(models: Models) -> LiteSpec:
    """Of the model's family. Errors: `UserError` if it has none."""
    if models.family.lllite is None:
        raise UserError(f"{models.family.title}: ControlNet-LLLite is not supported for this model")
    return models.family.lllite


def at_layers(models: Models, net: LiteNet) -> dict[str, nn.Module]:
    """Path of a layer of the denoiser -> the part of the net that stands there. Errors: `UserError` for parts of other
    layers, or of other sizes."""
    spec = spec_of(models)
    paths = {path.replace(".", "_"): path for path, m in models.denoiser.named_modules() if isinstance(m, nn.Linear)}
    found, wrong = {}, []
    for name, part in net.parts(spec.prefix).items():
        if name not in paths:
            wrong.append(f"{spec.prefix}{name}: the denoiser has no such layer{nearest(name, paths)}")
            continue
        width = cast(nn.Linear, models.denoiser.get_submodule(paths[name])).in_features
        if (own := cast(Part, part).width) != width:
            wrong.append(f"{spec.prefix}{name} is for a layer that takes {own} numbers, and here it takes {width}")
        found[paths[name]] = part
    if wrong or not found:
        raise UserError(f"{TITLE} is for another model", *wrong[:3])
    return found


def new_net(models: Models, emb_dim: int, dim: int, seed: int) -> LiteNet:
    """A net that changes nothing yet, in fp32; on the meta device if the denoiser is. `emb_dim`: channels that the
    image becomes; `dim`: width of the small nets."""
    spec = spec_of(models)
    wanted = spec.shapes(models.source.components["denoiser"].shapes(), models.options, emb_dim, dim)
    net = spec.net(wanted)
    if next(models.denoiser.parameters()).is_meta:
        return net
    return fill(net, {name: _start(spec, wanted, name, seed) for name in wanted}, TITLE)


def _start(spec: LiteSpec, wanted: Shapes, name: str, seed: int) -> Tensor:
    """The value of a new net's tensor: random ones are drawn as torch's own layers do, for the number of inputs."""
    if re.fullmatch(spec.zero, name):
        return torch.zeros(wanted[name])
    if re.fullmatch(spec.one, name):
        return torch.ones(wanted[name])
    bound = 1 / math.sqrt(math.prod(wanted[f"{name.rpartition('.')[0]}.weight"][1:]))
    return torch.empty(wanted[name]).uniform_(-bound, bound, generator=generator(seed, "lllite", name))


def is_lite(name: str) -> bool:
    """Whether a file holds such a net, of whichever family."""
    path = Path(name).expanduser()
    return path.is_file() and any(key.startswith("lllite_") for key in files.read_header(path).tensors)


def read_net(models: Models, path: Path, *, outline: bool = False) -> LiteNet:
    """The net of a file, frozen; `outline`: without values. Errors: `UserError` for a file of another kind, or for
    another model."""
    spec, header = spec_of(models), files.read_header(path)
    found = {name: tuple(info.shape) for name, info in header.tensors.items()}
    if not any(name.startswith(spec.prefix) for name in found):
        raise UserError(
            f"{path}: is not a ControlNet-LLLite of {models.family.title}: nothing is called {spec.prefix}..."
        )
    try:
        spec.check(found, header.metadata)
        net = spec.net(found)
        check(net, found, TITLE)
        at_layers(models, net)
        if not outline:
            fill(net, files.load(path), TITLE)
    except UserError as error:
        raise UserError(*(f"{path}: {message}" for message in error.messages)) from error
    return net


def save_net(
    models: Models, net: LiteNet, path: Path, *, metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write a net as sd-scripts does."""
    tensors = net.state_dict()
    more = spec_of(models).metadata(shapes(tensors))
    files.check_finite(tensors, f"the ControlNet-LLLite {path.name}", dtype)
    files.save(path, {n: t.to(dtype) if dtype else t for n, t in tensors.items()}, {**metadata, **more})
