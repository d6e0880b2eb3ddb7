"""Adapters on tiny models, for the tests of families' network_args."""

from __future__ import annotations

from typing import Any

import torch

from sfumato import families
from sfumato.adapters import AdapterPlan, parse
from sfumato.adapters.insert import AdapterNetwork, TargetLayer, choose
from sfumato.config import NetworkConfig
from sfumato.models.base import Models


def plan_of(family: str, *args: str, rank: int = 4, **more: Any) -> AdapterPlan:
    """A plan with these network_args."""
    return parse(NetworkConfig(network_dim=rank, network_args=args, **more), families.facts(family).network_args)


def places(models: Models, plan: AdapterPlan, component: str = "denoiser") -> list[TargetLayer]:
    """The layers that get adapters."""
    net, family = models.nets()[component], models.family
    return choose(
        net,
        component,
        family.targets[component],
        plan,
        lambda target: family.target_layer(models.options, plan, target),
        models.dialects["kohya"],
    )


def ranks(models: Models, *args: str) -> dict[str, int]:
    """Path -> rank of the denoiser's adapters under these network_args."""
    return {place.path: place.options.rank for place in places(models, plan_of(models.family.name, *args))}


def inserted(models: Models, plan: AdapterPlan, *components: str) -> AdapterNetwork:
    """Adapters with values, at work."""
    held = AdapterNetwork({name: places(models, plan, name) for name in components or ("denoiser",)}, seed=0).eval()
    g = torch.Generator().manual_seed(0)
    for name, p in held.named_parameters():
        if "lora_up" in name:
            p.data = 0.5 * torch.randn(p.shape, generator=g)
    return held
