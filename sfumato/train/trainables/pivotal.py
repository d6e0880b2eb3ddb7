"""Adapters, and beside them a new word of the text encoders, kept in the adapters' file (pivotal tuning,
arXiv:2106.05744)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from sfumato.adapters import AdapterPlan
from sfumato.config import Config
from sfumato.models import embedding_files
from sfumato.models.base import Models
from sfumato.optim.groups import Group
from sfumato.train.trainables.adapters import Adapters
from sfumato.train.trainables.embedding import NewWord


class Pivotal(Adapters):
    """Small changes to chosen layers, and the vectors of a word."""

    def __init__(self, models: Models, config: Config, plan: AdapterPlan) -> None:
        self.word = NewWord(models, config)
        super().__init__(models, config, plan)
        self.notices += tuple(self.word.notices)
        self.trained = tuple(dict.fromkeys((*self.trained, *self.word.encoders)))

    def weights(self) -> dict[str, nn.Parameter]:
        return {**super().weights(), **self.word.weights}

    def groups(self) -> list[Group]:
        return [*super().groups(), *self.word.groups()]

    def modules(self) -> nn.Module:
        return nn.ModuleList([super().modules(), self.word.modules])

    @contextmanager
    def without(self) -> Iterator[None]:
        with super().without(), self.word.words.unlearnt():
            yield

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **embedding_files.bundle(self.word.name, self.word.vectors())}

    def freeze_encoders(self) -> None:
        super().freeze_encoders()
        self.word.modules.requires_grad_(False)

    def remove(self) -> None:
        super().remove()
        self.word.words.remove()
