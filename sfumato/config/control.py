"""The settings of nets that make images follow others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sfumato.config.rules import Only, Rate, Record, Weights

_CONTROLNET = Only("controlnet", why="only `train controlnet` trains a ControlNet")


@dataclass(frozen=True, kw_only=True)
class ControlConfig(Record):
    """The ControlNet, when one is trained."""

    controlnet_model_name_or_path: Annotated[Weights, _CONTROLNET] = None
    """Start from this ControlNet: a file, a diffusers folder or a hub id; default: from a copy of the base model's own
    first blocks."""
    control_net_lr: Annotated[Rate | None, _CONTROLNET] = None
    """Learning rate of those of the ControlNet's weights that are no copies of the base model's: what the image goes
    through, and the last layers; default: learning_rate."""
