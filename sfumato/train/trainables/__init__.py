"""What is trained: whole nets or adapters on them. The loop sees no difference."""

from __future__ import annotations

from sfumato.adapters import AdapterPlan
from sfumato.config import Config, Method
from sfumato.models.base import Models
from sfumato.train.trainables.adapter_files import read_adapter
from sfumato.train.trainables.adapters import Adapters, adapter_rates
from sfumato.train.trainables.base import SAVE_DTYPES, Trainable, caches_latents, caches_text
from sfumato.train.trainables.full import Full, net_rates, whole_nets

__all__ = [
    "SAVE_DTYPES",
    "Adapters",
    "Full",
    "Trainable",
    "adapter_rates",
    "caches_latents",
    "caches_text",
    "make",
    "net_rates",
    "read_adapter",
    "whole_nets",
]


def make(method: Method, models: Models, config: Config, plan: AdapterPlan | None) -> Trainable:
    """What `method` trains of a model, whose nets may be without values. `plan`: of adapters, where they are trained.

    Errors: `UserError` for settings that do not go with the model.
    """
    if plan is not None:
        return Adapters(models, config, plan)
    return Full(models, config)
