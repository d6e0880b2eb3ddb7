"""A new word of the text encoders (textual inversion): nothing but its vectors changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.formats import files
from sfumato.models import embedding_files
from sfumato.models.base import Models
from sfumato.models.embeddings import Words, encoders_of, hidden_by, layer_of, readers_of, start
from sfumato.optim.groups import Group
from sfumato.tensors.random import generator
from sfumato.train import checkpoints
from sfumato.train.trainables.base import Trainable, save_dtype


class NewWord:
    """The word of `token_string` in all text encoders that can have one."""

    def __init__(self, models: Models, config: Config) -> None:
        """Errors: `UserError` for `weights` that do not fit."""
        e = config.embedding
        assert e.token_string
        self.name, self.encoders = e.token_string, encoders_of(models)
        given = _given(models, config)
        self.notices = [
            f"weights {e.weights}: nothing for {name}, where the word starts anew"
            for name in self.encoders
            if given and name not in given
        ]
        if hidden_by(models, [self.name]):
            self.notices.append(f"token_string {self.name}: a file has the same word, which it takes the place of")
        vectors = {}
        for name in self.encoders:
            chance = generator(config.train.seed, "word", self.name, name)
            table = layer_of(models.encoders[name]).weight
            made = start(models, name, e.init_word or "", e.num_vectors_per_token, chance)
            if e.xti:
                made = made.repeat(len(readers_of(models)), 1, 1)
            vectors[name] = given[name].to(table.device) if name in given else made
        if e.init_word:
            self.notices += _counted(models, e.init_word, e.num_vectors_per_token, self.encoders)
        self.words = Words(models, {self.name: vectors}, learnt=True)
        self.modules = nn.ModuleDict({name: rows for (name, _), rows in self.words.rows.items()})
        self.lr = config.optimizer.learning_rate if e.embedding_lr is None else e.embedding_lr
        if config.train.full_bf16:
            self.modules.to(torch.bfloat16)
        self.weights = {f"{name}.{self.name}": rows.vectors for (name, _), rows in self.words.rows.items()}

    def groups(self) -> list[Group]:
        """One for each encoder."""
        return [
            Group(name=f"{name} word", lr=self.lr, parameters=list(rows.parameters()))
            for name, rows in self.modules.items()
        ]

    def vectors(self) -> dict[str, Tensor]:
        """By encoder, as they are now."""
        return self.words.vectors()[self.name]


def _given(models: Models, config: Config) -> dict[str, Tensor]:
    """The vectors to start from, by encoder: of `weights`, or of an adapter's file that has the word."""
    e, network = config.embedding, config.network.network_weights
    if e.weights:
        named, found = f"weights {e.weights}", embedding_files.read(Path(e.weights), models, "weights")
        if e.token_string not in found and len(found) > 1:
            raise UserError(f"{named}: {', '.join(found)} are in it, and not {e.token_string}")
        given = found.get(e.token_string or "", next(iter(found.values())))
    else:
        named = f"network_weights {network}"
        found = embedding_files.in_adapter(Path(network), models, "network_weights") if network else {}
        given = found.get(e.token_string or "", {})
    if any((t.ndim == 3) != e.xti for t in given.values()):
        raise UserError(f"{named}: it is {'no' if e.xti else 'a'} file of extended textual inversion (xti)")
    if counts := {t.shape[-2] for t in given.values()} - {e.num_vectors_per_token}:
        raise UserError(
            f"{named}: its word has {min(counts)} vectors, and num_vectors_per_token is "
            f"{e.num_vectors_per_token}; set num_vectors_per_token to {min(counts)}"
        )
    return given


def _counted(models: Models, text: str, count: int, encoders: Iterable[str]) -> list[str]:
    """Notices of an `init_word` that has not as many tokens as the word has vectors."""
    tokens = {n: len(models.tokenizers[n](text, add_special_tokens=False).input_ids) for n in encoders}
    return [
        f"init_word {text!r} is {n} tokens for {name}, and the word has {count} vectors: it is "
        + ("repeated" if n < count else "cut")
        for name, n in tokens.items()
        if n not in (1, count)
    ]


class Embedding(Trainable):
    """The vectors of a new word."""

    kind = "textual-inversion"

    def __init__(self, models: Models, config: Config) -> None:
        self.models, self.config = models, config
        self.word = NewWord(models, config)
        self.trained: tuple[str, ...] = tuple(self.word.encoders)
        self.notices: tuple[str, ...] = tuple(self.word.notices)
        if self._by_word and (config.embedding.xti or len(self.trained) > 1):
            self.notices += (
                f"dialect {config.output.dialect}: no effect: diffusers' names are for a word of one text encoder that "
                "means the same to all blocks",
            )

    @property
    def _by_word(self) -> bool:
        """Whether the file is to have diffusers' names."""
        return self.config.output.dialect in ("diffusers", "peft")

    def weights(self) -> dict[str, nn.Parameter]:
        return self.word.weights

    def groups(self) -> list[Group]:
        return self.word.groups()

    def modules(self) -> nn.Module:
        return self.word.modules

    def without(self) -> AbstractContextManager[None]:
        return self.word.words.unlearnt()

    def freeze_encoders(self) -> None:
        self.word.modules.requires_grad_(False)

    def suffix(self) -> str:
        return checkpoints.ending(self.config.output, "embedding", "single_file")

    def tensors(self) -> dict[str, Tensor]:
        """Those of the result's file."""
        return embedding_files.write(self.word.name, self.word.vectors(), self.models, by_word=self._by_word)

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        dtype = save_dtype(self.config)
        tensors = {name: t.to(dtype) for name, t in self.tensors().items()}
        files.check_finite(tensors, f"the embedding {path.name}", dtype)
        files.save(path, tensors, metadata)

    def remove(self) -> None:
        self.word.words.remove()
