"""New words of text encoders (textual inversion, arXiv:2208.01618): rows kept beside the table of embeddings.

A word is put in from outside: its tokenizer knows further tokens, and hooks on the layer that looks embeddings up give
their rows. The table stays as it is, so that no other word can change.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfumato.data.batch import Cond, Tokens
from sfumato.data.strategies import TextEncodingStrategy
from sfumato.errors import UserError
from sfumato.models.base import Models
from sfumato.models.encoders.tokenizers import fingerprint

Vectors = Mapping[str, Tensor]
"""Text encoder -> the vectors (n, d) of a word there."""
CONTEXT = 2
"""Which argument of a part of the denoiser is what the caption says."""
PRIVATE = 0xF0000, 0xFFFE
"""Where Unicode has characters for private use (Supplementary Private Use Area-A), and how many: each is a token."""


def layer_of(net: nn.Module) -> nn.Embedding:
    """Where a text encoder looks embeddings up."""
    return cast(nn.Embedding, cast(Any, net).embedding)


def encoders_of(models: Models) -> list[str]:
    """The text encoders that can have new words: those that read the caption itself."""
    return [name for name in models.encoders if name in models.tokenizers and name not in models.family.wordless]


def widths_of(models: Models) -> dict[str, int]:
    """Text encoder that can have new words -> numbers of a vector."""
    return {name: layer_of(models.encoders[name]).embedding_dim for name in encoders_of(models)}


def readers_of(models: Models) -> dict[str, nn.Module]:
    """The parts of the denoiser that read the caption each by itself, by name. Errors: `UserError` if it has none."""
    if models.family.readers is None:
        raise UserError(
            f"extended textual inversion is for Stable Diffusion 1.x and 2.x, not for {models.family.title}"
        )
    return dict(models.family.readers(models.denoiser))


class Rows(nn.Module):
    """The vectors of a word in one text encoder."""

    def __init__(self, vectors: Tensor, *, learnt: bool) -> None:
        """`vectors` (n, d), or (r, n, d): others for each of r parts of the denoiser that read the caption."""
        super().__init__()
        self.vectors = nn.Parameter(vectors, requires_grad=learnt)
        self.first: Tensor | None
        self.register_buffer("first", vectors.clone() if learnt else None, persistent=False)
        self.reader = 0
        """The part that the caption is encoded for."""
        self.unlearnt = False
        """Whether it means what it meant first."""

    def forward(self) -> Tensor:
        """(n, d)"""
        vectors = self.first if self.unlearnt and self.first is not None else self.vectors
        return vectors[self.reader] if vectors.ndim == 3 else vectors


class WordTokenizer:
    """A tokenizer that knows new words besides: each is as many tokens as it has vectors."""

    def __init__(self, base: Any, words: Mapping[str, int], digest: str = "") -> None:
        """`words`: word -> its tokens; `digest`: of what they mean, if that stays."""
        self.base, self.words, self._digest = base, dict(words), digest
        # Words below are not cut by shorter ones of this one.
        longest = sorted(known_to(self), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE | re.ASCII)

    @cached_property
    def _own(self) -> Any:
        """A copy that knows the tokens: nothing is ever taken from a tokenizer again."""
        from transformers import AddedToken

        made = copy.deepcopy(self.base)
        # Not normalised: they are found before a text is changed in any way. A blank in front is the word's own.
        tokens = [AddedToken(token, normalized=False, special=False, lstrip=True) for token in self._tokens]
        made.add_tokens(tokens)
        return made

    @property
    def _tokens(self) -> list[str]:
        start, count = PRIVATE
        return [chr(start + (len(self.base) + i) % count) for i in range(sum(self.words.values()))]

    @cached_property
    def first(self) -> int:
        """The number of the first new token; the others follow."""
        return int(self._own.convert_tokens_to_ids(self._tokens[0]))

    @cached_property
    def _spelling(self) -> dict[str, str]:
        """Word in lower case -> its tokens."""
        tokens = iter(self._tokens)
        return {word.lower(): "".join(next(tokens) for _ in range(count)) for word, count in self.words.items()}

    def _spelt(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._spelling.get(found[0].lower(), found[0]), text)

    def __call__(self, text: str | Sequence[str], *args: Any, **named: Any) -> Any:
        texts = self._spelt(text) if isinstance(text, str) else [self._spelt(each) for each in text]
        return self._own(texts, *args, **named)

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, and of what the words mean."""
        return f"{fingerprint(self.base)} {self.words} {self._digest}"

    def add_tokens(self, tokens: Any) -> Any:
        """As a tokenizer's own: where words stand on words."""
        return self._own.add_tokens(tokens)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """As a tokenizer's own."""
        return self._own.convert_tokens_to_ids(tokens)

    def __len__(self) -> int:
        return len(self.base) + sum(self.words.values())

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "base":  # copy asks for such before there is anything
            raise AttributeError(name)
        return getattr(self.base, name)


def known_to(tokenizer: Any) -> set[str]:
    """The new words of a tokenizer, and of those below it, in lower case."""
    words = set[str]()
    while isinstance(tokenizer, WordTokenizer):
        words |= {word.lower() for word in tokenizer.words}
        tokenizer = tokenizer.base
    return words


def unasked(models: Models, texts: Iterable[str]) -> list[str]:
    """The new words of a model that are in none of the texts."""
    there = sorted({word for tokenizer in models.tokenizers.values() for word in known_to(tokenizer)})
    text = "\n".join(texts)
    return [w for w in there if not re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE | re.ASCII)]


def hidden_by(models: Models, words: Iterable[str]) -> list[str]:
    """Those of some words that a model knows already, which the new ones hide."""
    there = {word for tokenizer in models.tokenizers.values() for word in known_to(tokenizer)}
    return [word for word in words if word.lower() in there]


class Lookup:
    """Hooks on an embedding layer: ids of new tokens give the rows of their words."""

    def __init__(self, tokenizer: WordTokenizer, rows: Sequence[Rows]) -> None:
        self.tokenizer, self.rows = tokenizer, rows
        self._new = self._place = torch.zeros(())

    def on(self, layer: nn.Embedding) -> list[RemovableHandle]:
        """The hooks, to be removed some day."""
        return [layer.register_forward_pre_hook(self._before), layer.register_forward_hook(self._after)]

    def _before(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """ids (b, m) -> the same with any row of the table in the place of new ones."""
        count = sum(self.tokenizer.words.values())
        place = args[0] - self.tokenizer.first
        self._new = (place >= 0) & (place < count)
        self._place = place.clamp(0, count - 1)
        return (args[0].masked_fill(self._new, 0),)

    def _after(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """(b, m, d)"""
        rows = torch.cat([each() for each in self.rows]).to(out.device, out.dtype)
        new, place = self._new, self._place
        self._new = self._place = torch.zeros(())
        return torch.where(new[..., None], F.embedding(place, rows), out)


@dataclass(frozen=True)
class EncodeForEach:
    """Tokens -> cond of the strategy below, once for each of r parts of the denoiser that read the caption:
    (b, r, ...)."""

    below: TextEncodingStrategy
    rows: Sequence[Rows]
    count: int
    """r"""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the states depend on besides tokens and encoders."""
        return {**self.below.settings, "readers": self.count}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class."""
        found = []
        for reader in range(self.count):
            for each in self.rows:
                each.reader = reader
            found.append(self.below.encode(encoders, tokens))
        return {name: torch.stack([cond[name] for cond in found], 1) for name in found[0]}


def _own(reader: int, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A part of the denoiser takes what the caption says to it: (b, r, n, d) -> (b, n, d)."""
    return tuple(
        a[:, reader] if isinstance(a, Tensor) and i == CONTEXT and a.ndim == 4 else a for i, a in enumerate(args)
    )


class Words:
    """New words in a model's text encoders, until they are removed; the last that came are removed first."""

    def __init__(self, models: Models, words: Mapping[str, Vectors], *, learnt: bool = False) -> None:
        """`words`: word -> its vectors by encoder; an encoder that is not named reads the word as any other text."""
        self.models, self.before = models, (models.tokenizers, models.family)
        self.rows: dict[tuple[str, str], Rows] = {}
        """(encoder, word) -> its rows."""
        self._handles: list[RemovableHandle] = []
        tokenizers = dict(models.tokenizers)
        for name in dict.fromkeys(name for vectors in words.values() for name in vectors):
            mine = {word: vectors[name] for word, vectors in words.items() if name in vectors}
            rows = {word: Rows(vectors.detach().clone(), learnt=learnt) for word, vectors in mine.items()}
            counts = {word: vectors.shape[-2] for word, vectors in mine.items()}
            digest = "" if learnt else _digest(mine.values())
            tokenizers[name] = WordTokenizer(models.tokenizers[name], counts, digest)
            self._handles += Lookup(tokenizers[name], list(rows.values())).on(layer_of(models.encoders[name]))
            self.rows |= {(name, word): each for word, each in rows.items()}
        models.tokenizers = tokenizers
        if each := [rows for rows in self.rows.values() if rows.vectors.ndim == 3]:
            self._extend(each)

    def _extend(self, rows: Sequence[Rows]) -> None:
        """Captions are encoded for each part of the denoiser that reads them (XTI, arXiv:2303.09522)."""
        models, readers = self.models, readers_of(self.models)
        encode = models.family.encode

        def for_each(models: Models) -> TextEncodingStrategy:
            below = encode(models)
            if isinstance(below, EncodeForEach):  # there are such words already: they are encoded together
                return replace(below, rows=[*below.rows, *rows])
            return EncodeForEach(below, rows, len(readers))

        models.family = replace(models.family, encode=for_each)
        for i, part in enumerate(readers.values()):
            self._handles.append(part.register_forward_pre_hook(partial(_own, i)))

    def vectors(self) -> dict[str, dict[str, Tensor]]:
        """Word -> its vectors by encoder, as they are now."""
        out: dict[str, dict[str, Tensor]] = {}
        for (name, word), rows in self.rows.items():
            out.setdefault(word, {})[name] = rows.vectors.detach()
        return out

    @contextmanager
    def unlearnt(self) -> Iterator[None]:
        """Within, words that are learnt mean what they meant first."""
        for rows in self.rows.values():
            rows.unlearnt = True
        try:
            yield
        finally:
            for rows in self.rows.values():
                rows.unlearnt = False

    def remove(self) -> None:
        """The encoders and tokenizers are as before."""
        for handle in self._handles:
            handle.remove()
        self.models.tokenizers, self.models.family = self.before


@contextmanager
def known(models: Models, word: str, count: int) -> Iterator[None]:
    """Within, the tokenizers know a word of `count` vectors, so that captions are counted with it."""
    before, encoders = models.tokenizers, encoders_of(models)
    models.tokenizers = {n: WordTokenizer(t, {word: count}) if n in encoders else t for n, t in before.items()}
    try:
        yield
    finally:
        models.tokenizers = before


def _digest(vectors: Iterable[Tensor]) -> str:
    digest = blake2b(digest_size=8)
    for each in vectors:
        digest.update(each.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def start(models: Models, encoder: str, text: str, count: int, generator: torch.Generator) -> Tensor:
    """Vectors (count, d), fp32, for a word to begin with: what a text means to an encoder, cut or repeated; of an empty
    one: numbers as the table has them."""
    layer = layer_of(models.encoders[encoder])
    table = layer.weight.detach()
    ids = models.tokenizers[encoder](text, add_special_tokens=False).input_ids if text else []
    if ids:
        with torch.no_grad():
            found: Tensor = layer(torch.tensor([ids[i % len(ids)] for i in range(count)], device=table.device))
        return found.float()
    some = table[:: max(1, len(table) // SAMPLED)].float()
    chance = torch.randn(count, table.shape[1], generator=generator)
    return some.mean(0) + 0.1 * some.std(0) * chance.to(some.device)


SAMPLED = 4096
"""Rows of a table of which mean and deviation are taken."""
