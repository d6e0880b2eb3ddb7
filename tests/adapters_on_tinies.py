"""Adapters of any kind on tiny models, with values, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sfumato import families
from sfumato.adapters import files, parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.config import NetworkConfig
from sfumato.formats.files import save
from sfumato.models.base import Models


def adapter_state(
    models: Models, *args: str, kind: str = "lora", seed: int = 0, rank: int = 2, every: int = 1
) -> dict[Any, Any]:
    """The tensors of an adapter on all nets (`every`: on each so many-th layer), all of them away from their start. The
    nets may be without values."""
    plan = parse(
        NetworkConfig(network_module=kind, network_dim=rank, network_alpha=rank / 2, network_args=args),
        families.facts(models.family.name).network_args,
    )
    nets, targets = models.nets(), models.family.targets
    layers = {name: choose(nets[name], name, targets[name], plan) for name in nets if name in targets}
    network = AdapterNetwork({name: each[::every] for name, each in layers.items()}, seed=seed)
    network.remove()
    g = torch.Generator().manual_seed(seed)
    return {
        path: {
            name: t if name == "alpha" else 0.2 * torch.randn(t.shape, generator=g)
            for name, t in adapter.tensors().items()
        }
        for path, adapter in network.by_path().items()
    }


def adapter_file(models: Models, path: Path, *args: str, dialect: str = "kohya", **more: Any) -> dict[Any, Any]:
    """The same, saved; the tensors by layer."""
    state = adapter_state(models, *args, **more)
    save(path, files.write(models.dialects[dialect], state))
    return state
