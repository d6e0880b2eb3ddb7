"""A forward and backward pass of every family's tiny denoiser with adapters, for tests of what is done to its blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tinies.cases import Case, Files, cases
from torch import Tensor, nn

from sfumato import families
from sfumato.adapters import parse
from sfumato.adapters.insert import AdapterNetwork, choose
from sfumato.config import NetworkConfig
from sfumato.models.base import Models, SampleInfo
from sfumato.tensors.random import SampleRandom

CASES: Sequence[Case] = [next(case for case in cases() if case.family == family) for family in families.names()]
"""One of each family."""
_WRITTEN: dict[str, tuple[Files, Any]] = {}


def written(case: Case) -> Files:
    """The files of a case, written once for all tests of a process."""
    if case.name not in _WRITTEN:
        folder = tempfile.TemporaryDirectory()  # goes when the process does
        _WRITTEN[case.name] = case.write(Path(folder.name)), folder
    return _WRITTEN[case.name][0]


@dataclass(frozen=True)
class TinyStep:
    """A denoiser with adapters away from their start, whose dropouts act, and what it is given."""

    models: Models
    network: AdapterNetwork
    cond: Mapping[str, Tensor]

    @classmethod
    def of(cls, case: Case, *args: str, kind: str = "lora") -> TinyStep:
        """`args`: the adapter's arguments."""
        models = case.models(written(case), later=["vae"])
        plan = parse(
            NetworkConfig(network_module=kind, network_dim=2, network_args=args),
            families.facts(case.family).network_args,
        )
        chosen = choose(models.denoiser, "denoiser", models.family.targets["denoiser"], plan)
        network = AdapterNetwork({"denoiser": chosen}, seed=0)
        g = torch.Generator().manual_seed(0)
        for p in network.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=g)
        network.rng = SampleRandom((1, 2))
        with torch.no_grad():
            info = SampleInfo(sizes=torch.tensor([[64, 64, 0, 0, 64, 64]] * 2))
            cond = models.condition(models.encode(models.tokenize(["image 1, red", "blue"])), info)
        return cls(models, network, cond)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The denoiser's."""
        return self.models.family.blocks(self.models.denoiser)

    def loss(self, height: int = 8, width: int = 8) -> Tensor:
        """Of fixed latents of this size."""
        g = torch.Generator().manual_seed(1)
        x = torch.randn(2, self.models.family.latents.channels, height, width, generator=g)
        return self.models.predict(x, torch.tensor([100.0, 700.0]), self.cond).square().mean()

    def gradients(self, height: int = 8, width: int = 8) -> dict[str, Tensor]:
        """Of all that is trained, and the loss."""
        self.network.zero_grad()
        loss = self.loss(height, width)
        loss.backward()
        found = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **found}
