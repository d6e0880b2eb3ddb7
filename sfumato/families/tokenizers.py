"""CLIP's tokenizer: from a folder, or from the vocabulary that comes with sfumato."""

from __future__ import annotations

import gzip
import json
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sfumato.errors import UserError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(__file__).with_name("clip_bpe.txt.gz")
MERGES_USED = 49152 - 256 - 2
"""CLIP's vocabulary: 256 bytes, the same at the end of a word, this many merges, and two special tokens."""


def clip_tokenizer(folder: Path | None = None, *, pad: str = EOS) -> Any:
    """transformers' CLIPTokenizer of `folder`; None: CLIP's own vocabulary, padded with `pad`. Errors: `UserError`."""
    from transformers import CLIPTokenizer

    if folder is None:
        vocabulary, merges = stock_vocabulary()
        return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=pad, model_max_length=77)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"tokenizer folder {folder}: neither tokenizer.json nor vocab.json is in it; give a CLIP tokenizer's folder, or leave it out"
        )
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"tokenizer folder {folder} cannot be read: {error}") from error


@cache
def stock_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary {token: id} and its merges in order."""
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES_USED + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary (byte-level BPE of GPT-2, Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def fingerprint(tokenizer: Any) -> str:
    """Hash of the vocabulary."""
    return blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=8).hexdigest()


def is_stock(tokenizer: Any) -> bool:
    """Whether the tokenizer has CLIP's own vocabulary."""
    return bool(tokenizer.get_vocab() == stock_vocabulary()[0])
