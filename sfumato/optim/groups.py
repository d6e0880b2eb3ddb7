"""Trained parameters in groups, each with its own learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The parameters of a component."""

    name: str
    lr: float
    parameters: Sequence[nn.Parameter]
    plus: Sequence[nn.Parameter] = ()
    """Those of `parameters` that LoRA+ gives a higher rate (arXiv:2402.12354)."""
    loraplus_ratio: float | None = None
    """How many times higher; None: not at all."""

    def for_torch(self) -> list[dict[str, Any]]:
        """torch's parameter groups, with names; "NAME.plus" after "NAME" where LoRA+ is on."""
        if self.loraplus_ratio is None:
            return [{"name": self.name, "lr": self.lr, "params": list(self.parameters)}]
        fast = {id(p) for p in self.plus}
        return [
            {"name": self.name, "lr": self.lr, "params": [p for p in self.parameters if id(p) not in fast]},
            {"name": f"{self.name}.plus", "lr": self.lr * self.loraplus_ratio, "params": list(self.plus)},
        ]
