"""What a family says of itself before torch is imported: its options, and how its files are recognised."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["checkpoint", "adapter", "vae", "text_encoder", "embedding", "controlnet"]
WHOLE = ("denoiser", "text_encoder", "vae")
LEAF = re.compile(
    r".*\.((lora|hada|lokr)_\w+(\.\w+)*|lora\.(up|down)\.weight|oft_blocks|oft_diag|diff|diff_b|dora_scale|alpha)"
)
"""Names of an adapter's tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What a family says of a file that it knows."""

    family: str
    kind: Kind
    variant: str = ""
    """Version within the family ("v1", "v2"); empty: the file does not say."""
    dialect: str = ""
    """How its names are spelled: "ldm", "diffusers", "openclip" ...; of adapters "kohya", "comfy" or "peft"."""
    prediction: Literal["eps", "v"] | None = None
    """What the denoiser says; None: the file does not say."""
    parts: tuple[str, ...] = ()
    """Of a checkpoint, what of `WHOLE` it holds."""
    refused: str = ""
    """Of a checkpoint that cannot be trained, what it is, as the end of a sentence."""


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
    detect: Callable[[Shapes], Detected | None]
    """What a file with these tensors is, if it is of this family."""
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
    """What a prompt that does not say it is drawn with, where it differs from `sampling/prompts.py: Prompt`."""
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
