"""Nets and tokenizers that are made when they are first used: a run that caches their outputs never imports their
libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from sfumato.formats.metadata import remembered
from sfumato.models.encoders.tokenizers import fingerprint

T = TypeVar("T")


class OnDemand(Mapping[str, T]):
    """{name: value}, each made when it is first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], T]]) -> None:
        self._makers, self._made = dict(makers), dict[str, T]()

    def __getitem__(self, name: str) -> T:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def made(self) -> dict[str, T]:
        """Those that were asked for."""
        return {name: self._made[name] for name in self._makers if name in self._made}


class LaterTokenizer:
    """A tokenizer that is made when it is first used; what cache keys need of it is remembered from run to run."""

    def __init__(self, make: Callable[[Path | None], Any], folder: Path | None, home: Path) -> None:
        """`make`: of `TokenizerSpec`. `home`: the folder or file that it reads."""
        self._make, self._folder, self._home = make, folder, home

    @cached_property
    def _tokenizer(self) -> Any:
        return self._make(self._folder)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        paths = sorted(p for p in self._home.iterdir() if p.is_file()) if self._home.is_dir() else [self._home]
        name = f"tokenizer of {_qualified(self._make)} from {' '.join(str(p.resolve()) for p in paths)}"
        facts: dict[str, Any] = json.loads(remembered(name, paths, self._read_facts))
        return facts

    def _read_facts(self) -> str:
        made = self._tokenizer
        return json.dumps({"fingerprint": fingerprint(made), "pad_token_id": made.pad_token_id})

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary."""
        return str(self._facts["fingerprint"])

    @property
    def pad_token_id(self) -> int:
        """The token that fills what a caption leaves empty."""
        return int(self._facts["pad_token_id"])

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._tokenizer(*args, **named)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle and copy ask for such, and need no tokenizer
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


def _qualified(make: Callable[..., Any]) -> str:
    """A function's name with the arguments that it is bound to."""
    bound = f" with {make.args} {make.keywords}" if isinstance(make, partial) else ""
    function: Any = make.func if isinstance(make, partial) else make
    return f"{function.__module__}.{function.__qualname__}{bound}"
