"""Tiny models of every family for the tests that all families share: a new family is tested by a file `tests/tinies/NAME.py` with `CASES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato import families
from sfumato.models.base import Models
from sfumato.models.loading import load
from sfumato.sampling.prompts import Prompt

PROMPT = Prompt(prompt="a cat", negative_prompt="dull", width=48, height=32, sample_steps=3, scale=5.0, seed=1)


@dataclass(frozen=True, kw_only=True)
class Files:
    """A tiny model on the disk, as people have it: its base file, and files of its own for what that does not hold."""

    model: Path
    options: Mapping[str, str] = field(default_factory=dict)
    """Family options that name files: {"clip_l": ...}."""
    vae: str | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of tiny model: the same random weights as diffusers' pipeline and as the files that people download.

    Sizes are the real ones' in small; names, layout and kinds of blocks are the real ones'. Norms and biases are random too
    (they start at 1 and 0, which would hide a wrong place).
    """

    family: str
    variant: str
    pipeline: Callable[[], Any]
    """diffusers' pipeline of the parts, cached, in eval mode, not to be changed."""
    write: Callable[[Path], Files]
    """Write the files into a folder (tokenizers beside them, as `TokenizerSpec.folder` names them)."""
    encoded: Callable[[Any, Sequence[str]], Mapping[str, Tensor]]
    """(pipeline, captions) -> what its `encode_prompt` says, by the names in our cond; as many rows of a ragged field as it gives."""
    drawn: Callable[[Any, Prompt, Tensor], Tensor]
    """(pipeline, prompt, noise (1, c, h, w)) -> the latents (c, h, w) that the pipeline draws, in the shape of ours, before the VAE."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further family options of the kind (a prediction, say), as a user would set them."""
    prompt: Prompt = PROMPT
    """What `drawn` is compared on."""
    sampler: str = "euler"
    unmoved: str = r"(?!)"
    """Pattern of `component.path` for weights that cannot change when a whole model with all encoders is trained (a layer after the
    one that is used, say)."""

    @property
    def name(self) -> str:
        return f"{self.family}-{self.variant}"

    def models(self, files: Files, **more: Any) -> Models:
        """The files as sfumato loads them."""
        told = families.facts(self.family).options(**{**files.options, **self.options, **more.pop("options", {})})
        return load(families.family(self.family), str(files.model), told, **{"vae": files.vae, **more})


@cache
def modules() -> tuple[Any, ...]:
    """`tests/tinies/NAME.py` of each family that has one, by name."""
    here = Path(__file__).parent
    return tuple(import_module(f"tinies.{name}") for name in families.names() if (here / f"{name}.py").exists())


@cache
def cases() -> tuple[Case, ...]:
    """The cases of all families that have some."""
    return tuple(case for module in modules() for case in module.CASES)
