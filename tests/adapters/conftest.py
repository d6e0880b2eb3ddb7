"""What the tests of adapters share."""

from __future__ import annotations

from typing import Any

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


FORMS: dict[str, list[dict[str, Any]]] = {
    "loha": [{"use_tucker": True}, {"dora_wd": True}],
    "lokr": [{"factor": 1}, {"factor": 1, "use_tucker": True}, {"dora_wd": True}],
}
"""Options by which a kind has other tensors than by default, in the small net."""
PLANS = [(name, more) for name in adapters.kinds() for more in [{}, *FORMS.get(name, [])]]


@pytest.fixture(params=PLANS, ids=lambda p: "-".join([p[0], *p[1]]))
def plan(request: pytest.FixtureRequest) -> AdapterPlan:
    """A plan of every kind there is, in each of its forms."""
    name, more = request.param
    return AdapterPlan(kind=adapters.kind(name), rank=4, alpha=2.0, conv_rank=3, conv_alpha=1.5, more=more)
