"""What the trainables have in common: the protocol that the loop knows, and what of their settings others ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.optim.groups import Group

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Trainable(ABC):
    """Something with weights to train, that can list them in groups and write them to a file."""

    kind: str
    """Ending of the modelspec architecture: "" for a whole model, "lora" for an adapter."""
    trained: tuple[str, ...]
    """Components that change."""
    notices: tuple[str, ...] = ()
    """Notes for the user on how it was put together."""

    @abstractmethod
    def weights(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, or was before it was frozen, and what adapters keep of their start, by a name
        that stays the same from run to run."""

    @abstractmethod
    def groups(self) -> list[Group]:
        """The weights in groups with their learning rates."""

    @abstractmethod
    def modules(self) -> nn.Module:
        """A module that holds the weights, for gradient exchange."""

    @abstractmethod
    def suffix(self) -> str:
        """Ending of the result's file name; empty for a folder."""

    @abstractmethod
    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the result."""

    def train(self, mode: bool) -> None:
        """Dropouts on or off."""
        self.modules().train(mode)

    def on_batch(self, batch: Batch) -> None:  # noqa: B027
        """Called before each batch, on its device."""

    def on_noise(self, level: Tensor) -> None:  # noqa: B027
        """Called before each forward pass: how much noise (b,) the samples have, 0 to 1."""

    def without(self) -> AbstractContextManager[None] | None:
        """A context in which nothing of it acts, so that the nets are those of the base model; None: there is no such
        thing."""
        return None

    def kept_gradients(self) -> Iterable[nn.Parameter]:
        """Weights whose gradients `after_step` reads."""
        return ()

    def after_step(self) -> Mapping[str, Tensor]:
        """Called after each optimizer step, while the gradients of `kept_gradients` are still there. Returns what is to
        be logged, 0-d tensors by name."""
        return {}

    def freeze_encoders(self) -> None:  # noqa: B027
        """Stop training the text encoders."""

    def frozen_digest(self) -> str:
        """A fingerprint of what the result holds besides what is trained and the base model; empty for nothing."""
        return ""

    def remove(self) -> None:  # noqa: B027
        """The nets are again as they were, but for weights of theirs that were trained."""


def save_dtype(config: Config) -> torch.dtype | None:
    """The number format of the result; None: that in which it is trained."""
    precision = config.output.save_precision
    return SAVE_DTYPES[precision] if precision else None


def caches_text(config: Config) -> bool:
    """Whether text outputs are cached, so that no text encoder is trained."""
    return config.data.cache_text_encoder_outputs or config.data.cache_text_encoder_outputs_to_disk


def caches_latents(config: Config) -> bool:
    """Whether latents are cached."""
    return config.data.cache_latents or config.data.cache_latents_to_disk
