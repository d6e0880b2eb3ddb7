"""Chooses layers by path, gives each an adapter, and listens at its door; the net's own tensors and keys stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan, of_leaves
from sfumato.adapters.base import Adapter, LayerOptions, Moment
from sfumato.errors import UserError
from sfumato.formats.dialect import Leaves, Site
from sfumato.tensors.random import Draws, generator


class Place(NamedTuple):
    """A layer that gets an adapter."""

    path: str
    """Its module path in the net."""
    layer: nn.Module
    options: LayerOptions


def choose(
    net: nn.Module,
    component: str,
    targets: Mapping[str, tuple[str, ...]],
    plan: AdapterPlan,
    layer: Callable[[Place], Place | None] = lambda place: place,
) -> list[Place]:
    """The layers of a net that get adapters, in the net's order.

    `targets`: patterns (fnmatch on module paths) by layer kind. Layers under "linear" always get one; layers
    under "conv" only if the plan has a rank for convolutions. The rank goes by the layer: `rank` for linear
    layers and 1x1 convolutions, `conv_rank` (if there is one) for larger ones; `layer` has the last word on each, and may
    leave it out.
    Errors: `UserError` if there is nothing to train.
    """
    patterns = targets.get("linear", ()) + (targets.get("conv", ()) if plan.conv_rank else ())
    places = []
    for path, module in net.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not any(fnmatchcase(path, p) for p in patterns):
            continue
        large = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        if place := layer(Place(path, module, plan.options(conv=large and plan.conv_rank is not None))):
            places.append(place)
    if not places:
        raise UserError(f"{component}: no layer is left to put an adapter on, of those with paths like {', '.join(patterns) or 'any'}")
    _check_ranks(component, places)
    return places


def _check_ranks(component: str, places: Sequence[Place]) -> None:
    """Errors: `UserError` for ranks above what any of these layers can have; a layer of its own may be smaller than the common rank."""
    for name, large in (("network_dim", False), ("conv_dim", True)):
        chosen = [p for p in places if (isinstance(p.layer, nn.Conv2d) and p.layer.kernel_size != (1, 1)) == large]
        rank = max((p.options.rank for p in chosen), default=0)
        most = max((_full_rank(p.layer) for p in chosen), default=0)
        if rank > most:
            raise UserError(f"{name} {rank}: no change of {component}'s layers has a rank above {most}; choose one below that, such as 32")


def _full_rank(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return min(len(weight), weight[0].numel())


class Norms(NamedTuple):
    """What `Inserted.scale_norms` found."""

    mean: float
    largest: float
    scaled: int
    """Layers whose change was scaled down."""


class Inserted(nn.Module):
    """Adapters at their layers. An `nn.Module` of the adapters alone: its parameters are what is trained."""

    def __init__(self, places: Mapping[str, Sequence[Place]], kind: type[Adapter], *, seed: int) -> None:
        """`places`: by component ("denoiser", "clip_l"). Start values depend on the seed and on each layer's own name."""
        super().__init__()
        self.moment = Moment()
        self._sites: dict[Site, tuple[Adapter, nn.Module]] = {}
        self._handles = []
        self.held = nn.ModuleDict()
        for component, chosen in places.items():
            self.held[component] = held = nn.ModuleDict()
            for path, layer, options in chosen:
                adapter = kind(layer, options, generator(seed, "adapter", component, path))
                adapter.site, adapter.moment = f"{component}.{path}", self.moment
                held[path.replace(".", "|")] = adapter  # names of parts take no dots
                self._sites[component, path] = adapter, layer
                self._handles.append(layer.register_forward_hook(_listen(adapter)))

    @property
    def multiplier(self) -> float | Tensor:
        """Strength of all adapters: a number, or (b,) one a sample."""
        return self.moment.multiplier

    @multiplier.setter
    def multiplier(self, value: float | Tensor) -> None:
        self.moment.multiplier = value

    @property
    def draws(self) -> Draws | None:
        """Where the dropouts come from; to be set for every batch if there are any."""
        return self.moment.draws

    @draws.setter
    def draws(self, value: Draws | None) -> None:
        self.moment.draws = value

    def sites(self) -> dict[Site, Adapter]:
        """(component, module path) -> adapter, in the nets' order."""
        return {site: adapter for site, (adapter, _) in self._sites.items()}

    def state(self) -> dict[Site, Leaves]:
        """All tensors as a file holds them; not copied."""
        return {site: adapter.leaves() for site, adapter in self.sites().items()}

    def load(self, state: Mapping[Site, Leaves]) -> None:
        """The reverse of `state`. Errors: one `UserError` for missing, unknown or differently shaped layers."""
        own = self.sites()
        missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
        errors = [f"the file has no adapter for {_names(missing)}"] if missing else []
        if unknown:
            errors.append(f"the file has adapters for {_names(unknown)}, where this run has none")
        for site in own.keys() & state.keys():
            try:
                own[site].load_leaves(state[site])
            except UserError as e:
                errors += e.messages
        if errors:
            raise UserError(*sorted(errors)[:8])

    @torch.no_grad()
    def merge(self, sign: float = 1.0) -> None:
        """Add `sign * multiplier *` every change to its layer's weight, for good. Call `remove` as well, or it acts twice."""
        if isinstance(self.multiplier, Tensor):
            raise RuntimeError("a multiplier for each sample cannot be merged")
        for adapter, layer in self._sites.values():
            weight = layer.weight
            assert isinstance(weight, Tensor)
            weight.copy_(weight.float() + sign * self.multiplier * adapter.change(weight))

    def remove(self) -> None:
        """The nets are again as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def scale_norms(self, limit: float) -> Norms:
        """Scale every change whose norm is above `limit` down to it (max-norm regularisation)."""
        norms, scaled = zip(*(adapter.scale_norm(limit) for adapter in self.sites().values()), strict=True)
        all_norms = torch.stack(norms)
        return Norms(all_norms.mean().item(), all_norms.max().item(), int(torch.stack(scaled).sum().item()))


def from_state(nets: Mapping[str, nn.Module], state: Mapping[Site, Leaves], plan: AdapterPlan | None = None, *, seed: int = 0) -> Inserted:
    """Adapters with the layers, ranks, alphas and values of a file; dropouts and the like come from `plan`.

    `nets`: by component. Errors: `UserError` for an empty file, several kinds in one file, or another kind than the plan's.
    """
    if not state:
        raise UserError("the file holds no adapter")
    read = {site: of_leaves(leaves) for site, leaves in state.items()}
    found = {kind for kind, _ in read.values()} | ({plan.kind} if plan else set())
    if len(found) > 1:
        raise UserError(f"several kinds of adapters where one was expected: {', '.join(sorted(k.__name__ for k in found))}")
    places: dict[str, list[Place]] = {}
    for component, net in nets.items():
        for path, layer in net.named_modules():
            if (component, path) in read:
                options = read[component, path][1]
                if plan:
                    options = replace(options, **plan.more)
                places.setdefault(component, []).append(Place(path, layer, options))
    inserted = Inserted(places, found.pop(), seed=seed)
    try:
        inserted.load(state)
    except UserError:
        inserted.remove()
        raise
    return inserted


def _listen(adapter: Adapter) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        out: Tensor = adapter(args[0], y)
        return out

    return hook


def _names(sites: set[Site]) -> str:
    names = sorted(".".join(site) for site in sites)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
