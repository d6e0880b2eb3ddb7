"""What the tests of adapters share."""

from __future__ import annotations

import pytest
import torch
from small import Net
from torch import Tensor

from sfumato import adapters
from sfumato.adapters import AdapterPlan


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 6, 8, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=adapters.kinds())
def plan(request: pytest.FixtureRequest) -> AdapterPlan:
    """A plan of every kind there is."""
    return AdapterPlan(kind=adapters.kind(request.param), rank=4, alpha=2.0, conv_rank=3, conv_alpha=1.5)
