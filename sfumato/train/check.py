"""What can be told of a run before a picture or a weight is read; `plan` and `train` ask the same function."""

from __future__ import annotations

from sfumato import adapters, families
from sfumato.adapters import AdapterPlan
from sfumato.config import Config, Method
from sfumato.families.loading import examine
from sfumato.train.prompts import Prompt, default, read_prompts, sampler


def check(config: Config, method: Method) -> tuple[list[Prompt], AdapterPlan | None]:
    """What can be told before a picture or a weight is read: the prompts, and the plan of adapters. Errors: `UserError`."""
    prompts = read_prompts(config.sample.sample_prompts, default(config.family)) if config.sample.sample_prompts else []
    sampler(config.sample.sample_sampler)
    plan = adapters.parse(config.network, families.facts_of(config.family).network_args) if method == "network" else None
    examine_model(config)
    return prompts, plan


def examine_model(config: Config) -> None:
    """The model's files by their headers. Errors: `UserError` for what is missing, or of another family."""
    examine(families.of(config.family), config.model.pretrained_model_name_or_path, config.family, vae=config.model.vae)
