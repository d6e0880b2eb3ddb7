"""Chooses layers by path and gives each an adapter in a forward hook; the net's own tensors and keys stay the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import translate
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.adapters.base import Adapter, AdapterContext, LayerOptions
from sfumato.adapters.find import from_tensors
from sfumato.adapters.plan import DENOISER, AdapterPlan, LayerNames, options_as
from sfumato.errors import UserError
from sfumato.formats.dialect import NATIVE, AdapterTensors, Dialect, ModulePath
from sfumato.tensors.random import SampleRandom, generator

_RANKS = "a file of another rank needs its own network_dim, or --dim_from_weights"


class TargetLayer(NamedTuple):
    """A layer that gets an adapter."""

    path: str
    """Its module path in the net."""
    layer: nn.Module
    options: LayerOptions
    kind: type[Adapter]
    ranked: bool = False
    """Whether a rule has named its rank, which stands then."""

    @property
    def is_large(self) -> bool:
        """Whether it is a convolution larger than 1x1, which has a rank of its own."""
        return isinstance(self.layer, nn.Conv2d) and self.layer.kernel_size != (1, 1)


def choose(
    net: nn.Module,
    component: str,
    targets: Mapping[str, tuple[str, ...]],
    plan: AdapterPlan,
    target_layer: Callable[[TargetLayer], TargetLayer | None] = lambda target: target,
    kohya: Dialect = NATIVE,
) -> list[TargetLayer]:
    """The layers of a net that get adapters, in the net's order.

    `targets`: patterns (fnmatch on module paths) by set of layers. Unless the plan names sets, those under "linear"
    get one, and those under "conv" if the plan has a rank for convolutions. The rank goes by the layer: `rank` for
    linear layers and 1x1 convolutions, `conv_rank` (if there is one) for larger ones; `target_layer` has a word on
    each, and may leave it out; what the plan's rules say of a layer stands. `kohya`: the dialect in whose names they
    may be written. Errors: `UserError` if there is nothing to train, and for a `conv_dim` that does nothing.
    """
    patterns = plan.patterns(component, targets)
    chosen = []
    for path, module in net.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        names = layer_names(component, path, targets, kohya)
        if not plan.wants(names, named=_among(path, patterns)):
            continue
        if target := _target(path, module, plan, names, target_layer):
            chosen.append(target)
    if not chosen:
        raise UserError(
            f"{component}: no layer is left to put an adapter on, of those with paths like "
            f"{', '.join(patterns) or 'any'}"
        )
    if (
        component == DENOISER
        and plan.conv_rank
        and not any(p.is_large and p.options.rank == plan.conv_rank for p in chosen)
    ):
        raise UserError(
            "network_args conv_dim: does nothing, as none of the layers that get adapters is a convolution larger than "
            "1x1; leave it out"
        )
    _check_ranks(component, chosen)
    return chosen


def _target(
    path: str,
    layer: nn.Linear | nn.Conv2d,
    plan: AdapterPlan,
    names: LayerNames,
    target_layer: Callable[[TargetLayer], TargetLayer | None],
) -> TargetLayer | None:
    """The layer with its options; None: it has no adapter."""
    kind = plan.own("kind", names) or plan.kind
    target = TargetLayer(path, layer, plan.options(conv=False), kind, plan.own("rank", names) is not None)
    rank, alpha = plan.own("rank", names), plan.own("alpha", names)
    if (target.is_large and not plan.large) or rank == 0 or plan.own("rate", names) == 0:
        return None
    options = plan.options(conv=target.is_large and plan.conv_rank is not None)
    if kind is not plan.kind or plan.own("more", names):
        options = options_as(kind, options, plan.own("more", names) or {})
    if rank is not None:
        options = replace(options, rank=rank)
    if (chosen := target_layer(target._replace(options=options))) and alpha is not None:
        return chosen._replace(options=replace(chosen.options, alpha=alpha))
    return chosen


def layer_names(component: str, path: str, targets: Mapping[str, tuple[str, ...]], kohya: Dialect) -> LayerNames:
    """What a layer is called: by its path here, by that in sd-scripts' net, and in kohya's files."""
    match = kohya.keys[component].match(path, native=True) if component in kohya.keys else None
    theirs = match.foreign()[0] if match else path
    paths = dict.fromkeys((path, theirs))
    lora = kohya.prefix.get(component, "") + theirs.replace(".", "_")
    sets = frozenset(name for name, patterns in targets.items() if _among(path, patterns))
    return LayerNames((*paths, *(f"{component}.{p}" for p in paths)), lora, sets)


@cache
def _pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)) or "(?!)")


def _among(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of these patterns (fnmatch) is of a path: a run asks for each of its layers, several times."""
    return bool(_pattern(patterns).match(path))


def _check_ranks(component: str, chosen: Sequence[TargetLayer]) -> None:
    """Errors: `UserError` for ranks above what any of these layers can have; a layer of its own may be smaller than the
    common rank."""
    for name, large in (("network_dim", False), ("conv_dim", True)):
        ranked = [p for p in chosen if p.kind.has_rank and not p.kind.any_rank]
        alike = [p for p in ranked if p.is_large == large]
        rank = max((p.options.rank for p in alike), default=0)
        most = max((_full_rank(p.layer) for p in alike), default=0)
        if rank > most:
            raise UserError(
                f"{name} {rank}: no change of {component}'s layers has a rank above {most}; choose one below that, "
                "such as 32"
            )


def _full_rank(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return min(len(weight), weight[0].numel())


class Norms(NamedTuple):
    """What `AdapterNetwork.scale_norms` found: 0-d tensors, so that nothing is read back from the device."""

    mean: Tensor
    largest: Tensor
    scaled: Tensor
    """Layers whose change was scaled down."""


class AdapterNetwork(nn.Module):
    """Adapters at their layers. An `nn.Module` of the adapters alone: its parameters are what is trained."""

    def __init__(self, chosen: Mapping[str, Sequence[TargetLayer]], *, seed: int) -> None:
        """`chosen`: by component ("denoiser", "clip_l"). Start values depend on the seed and on each layer's own
        name."""
        super().__init__()
        self.context = AdapterContext()
        self._hooked: dict[ModulePath, tuple[Adapter, nn.Module]] = {}
        self._handles = []
        self.components = nn.ModuleDict()
        for component, layers in chosen.items():
            self.components[component] = adapters = nn.ModuleDict()
            for path, layer, options, kind, _ in layers:
                adapter = kind(layer, options, generator(seed, "adapter", component, path))
                adapter.name, adapter.context = f"{component}.{path}", self.context
                adapters[path.replace(".", "|")] = adapter  # names of parts take no dots
                self._hooked[component, path] = adapter, layer
                if kind.adapt_input is not Adapter.adapt_input:
                    self._handles.append(layer.register_forward_pre_hook(_input_hook(adapter)))
                self._handles.append(layer.register_forward_hook(_hook(adapter)))

    @property
    def multiplier(self) -> float | Tensor:
        """Strength of all adapters: a number, or (b,), one per sample."""
        return self.context.multiplier

    @multiplier.setter
    def multiplier(self, value: float | Tensor) -> None:
        self.context.multiplier = value

    @property
    def noise_level(self) -> Tensor | None:
        """(b,) how much noise the batch's latents have, 0 to 1."""
        return self.context.noise_level

    @noise_level.setter
    def noise_level(self, value: Tensor | None) -> None:
        self.context.noise_level = value

    @property
    def rng(self) -> SampleRandom | None:
        """Where the dropouts come from; to be set for every batch if there are any."""
        return self.context.rng

    @rng.setter
    def rng(self, value: SampleRandom | None) -> None:
        self.context.rng = value

    def by_path(self) -> dict[ModulePath, Adapter]:
        """(component, module path) -> adapter, in the nets' order."""
        return {path: adapter for path, (adapter, _) in self._hooked.items()}

    def state(self) -> dict[ModulePath, AdapterTensors]:
        """All tensors as a file holds them; not copied."""
        return {path: adapter.tensors() for path, adapter in self.by_path().items()}

    def load(self, state: Mapping[ModulePath, AdapterTensors]) -> None:
        """The reverse of `state`. Errors: one `UserError` for missing, unknown or differently shaped layers."""
        own = self.by_path()
        missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
        errors = [f"the file has no adapter for {_names(missing)}"] if missing else []
        if unknown:
            errors.append(
                f"the file has adapters for {_names(unknown)}, where this run has none; --dim_from_weights takes the "
                "file's layers"
            )
        for path in own.keys() & state.keys():
            try:
                own[path].load_tensors(state[path])
            except UserError as e:
                errors += (f"{message}; {_RANKS}" for message in e.messages)
        if errors:
            raise UserError(*sorted(errors)[:8])

    @torch.no_grad()
    def merge(self) -> None:
        """Add every change, times the multiplier, to its layer, for good: not every kind's could be taken out again.
        Call `remove` as well, or it acts twice."""
        if isinstance(self.multiplier, Tensor):
            raise RuntimeError("a multiplier for each sample cannot be merged")
        for adapter, layer in self._hooked.values():
            weight = layer.weight
            assert isinstance(weight, Tensor)
            bias = layer.bias if isinstance(layer.bias, Tensor) else None
            more = None if bias is None else adapter.delta_bias(bias)
            changed = weight.float() + self.multiplier * adapter.delta_weight(weight)
            if isinstance(weight, nn.Parameter):
                weight.copy_(changed)
            else:  # made of what is stored, each time that it is asked for
                layer.weight = changed
            if bias is not None and more is not None:
                bias.copy_(bias.float() + self.multiplier * more)

    def remove(self) -> None:
        """The nets are again as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def after_step(self) -> None:
        """To be called after each optimizer step, while the gradients are still there."""
        for adapter in self.by_path().values():
            adapter.after_step()

    def scale_norms(self, limit: float) -> Norms:
        """Scale every change whose norm is above `limit` down to it (max-norm regularisation)."""
        norms, scaled = zip(*(adapter.scale_norm(limit) for adapter in self.by_path().values()), strict=True)
        all_norms = torch.stack(norms)
        return Norms(all_norms.mean(), all_norms.max(), torch.stack(scaled).sum())


def from_state(
    nets: Mapping[str, nn.Module],
    state: Mapping[ModulePath, AdapterTensors],
    plan: AdapterPlan | None = None,
    *,
    seed: int = 0,
) -> AdapterNetwork:
    """Adapters with the layers, ranks, alphas and values of a file; dropouts and the like come from `plan`.

    `nets`: by component. Errors: `UserError` for an empty file, or another kind than the plan's.
    """
    if not state:
        raise UserError("the file holds no adapter")
    read = check_kinds(state, plan)
    chosen: dict[str, list[TargetLayer]] = {}
    for component, net in nets.items():
        for path, layer in net.named_modules():
            if (component, path) in read:
                kind, options = read[component, path]
                if plan:
                    options = kind.with_args(options, plan.more_for(kind))
                chosen.setdefault(component, []).append(TargetLayer(path, layer, options, kind))
    network = AdapterNetwork(chosen, seed=seed)
    try:
        network.load(state)
    except UserError:
        network.remove()
        raise
    return network


def check_kinds(
    state: Mapping[ModulePath, AdapterTensors], plan: AdapterPlan | None
) -> dict[ModulePath, tuple[type[Adapter], LayerOptions]]:
    """The kind and the options of each layer in a file. Errors: `UserError` for another kind than the plan's."""
    read = {}
    for path, tensors in state.items():
        try:
            read[path] = from_tensors(tensors, plan.kind if plan else None)
        except UserError as error:
            raise UserError(*(f"{'.'.join(path)}: {message}" for message in error.messages)) from None
    if plan and (others := {kind.__name__ for kind, _ in read.values() if kind not in plan.kinds()}):
        several = len({kind for kind, _ in read.values()}) > 1
        cure = "name its kind with network_module, or leave network_module out"
        raise UserError(
            f"the file holds {', '.join(sorted(others))}, and {plan.kind.__name__} is trained: "
            f"{'several kinds in one file need the preset file that they were trained with' if several else cure}"
        )
    return read


def _input_hook(adapter: Adapter) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (adapter.adapt_input(args[0]), *args[1:]) if adapter.context.acts else args

    return hook


def _hook(adapter: Adapter) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        out: Tensor = adapter(args[0], y, layer) if adapter.context.acts else y
        return out

    return hook


def _names(paths: set[ModulePath]) -> str:
    names = sorted(".".join(path) for path in paths)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
