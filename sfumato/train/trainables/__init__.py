"""What is trained: whole nets or adapters on them. The loop sees no difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sfumato.adapters import AdapterPlan
from sfumato.config import Config, Method
from sfumato.models.base import Models
from sfumato.train.trainables.adapter_files import read_adapter
from sfumato.train.trainables.adapters import Adapters, adapter_rates
from sfumato.train.trainables.base import SAVE_DTYPES, Trainable, caches_latents, caches_text
from sfumato.train.trainables.controlnet import ControlNet
from sfumato.train.trainables.embedding import Embedding
from sfumato.train.trainables.full import Full, net_rates, whole_nets
from sfumato.train.trainables.lllite import LLLite
from sfumato.train.trainables.pivotal import Pivotal

__all__ = [
    "MAKERS",
    "SAVE_DTYPES",
    "Adapters",
    "ControlNet",
    "Embedding",
    "Full",
    "LLLite",
    "Pivotal",
    "Trainable",
    "adapter_rates",
    "caches_latents",
    "caches_text",
    "make",
    "net_rates",
    "read_adapter",
    "whole_nets",
]


MAKERS: Mapping[Method, Callable[[Models, Config], Trainable]] = {
    "full": Full,
    "embedding": Embedding,
    "controlnet": ControlNet,
    "lllite": LLLite,
}
"""What is trained -> the class; adapters take a plan besides."""


def make(method: Method, models: Models, config: Config, plan: AdapterPlan | None) -> Trainable:
    """What `method` trains of a model, whose nets may be without values. `plan`: of adapters, where they are trained.

    Errors: `UserError` for settings that do not go with the model.
    """
    if plan is None:
        return MAKERS[method](models, config)
    return (Pivotal if config.embedding.token_string else Adapters)(models, config, plan)
