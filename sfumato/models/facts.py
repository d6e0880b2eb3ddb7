"""What a family's `facts.py` holds: all that is known of it before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sfumato.models.detection import Signature


@dataclass(frozen=True, slots=True)
class Idle:
    """Options of a family that do nothing when `when` holds."""

    keys: tuple[str, ...]
    when: Callable[[Any], Any]
    """Of all settings of the run by name, the common ones too, and `method` ("network" or "full")."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The record `FACTS` of a family's `facts.py`."""

    options: type
    """The dataclass of what a run can be told about this family alone."""
    signature: Signature
    """How its files are recognised."""
    architecture: Callable[[Any], str]
    """options -> the model's name in modelspec metadata, without the ending for adapters."""
    base_model_version: Callable[[Any], str]
    """options -> the model's name in sd-scripts' metadata, `ss_base_model_version`."""
    pipelines: tuple[str, ...]
    """Classes that a diffusers folder of this family names."""
    denoiser_folder: str = "transformer"
    needed: tuple[str, ...] = ("denoiser",)
    """What of `WHOLE` a base model's file must hold; the rest may come from files of its own."""
    scripts: Mapping[str, Literal["network", "full"]] = field(default_factory=dict)
    """kohya's scripts -> what they train."""
    trains_text: tuple[str, ...] = ()
    """Those of `scripts` that train the text encoder unless told otherwise."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Settings of all families that have another default here."""
    prompt: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of prompts, where it differs from `sampling/prompts.py: Prompt`."""
    paths: tuple[str, ...] = ()
    """Options that name a file, a folder or a hub id."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Settings that would do nothing for this family, and why."""
    idle: tuple[Idle, ...] = ()
    """Options that do nothing beside others."""
    check: Callable[[Any], Sequence[str]] = lambda options: ()
    """options -> a message, beginning with an option's name, for each one that is out of range or contradicts
    another."""
    network_args: type | None = None
    """The dataclass of network_args that only this family has; its fields are int, float, bool or str, or None where
    not set."""
    metadata: tuple[str, ...] = ()
    """Options that are written into results, as `ss_<option>`."""
