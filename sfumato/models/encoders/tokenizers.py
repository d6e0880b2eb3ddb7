"""Tokenizers of the text encoders: CLIP's, T5's, Qwen's and byT5's from a folder or from what comes with sfumato,
Gemma's from a folder."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError
from sfumato.models import locate

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.data.strategies import Limit

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(__file__).with_name("clip_bpe.txt.gz")
MERGES_USED = 49152 - 256 - 2
"""CLIP's vocabulary: 256 bytes, the same at the end of a word, this many merges, and two special tokens."""


def clip_tokenizer(folder: Path | None = None, *, pad: str = EOS) -> Any:
    """transformers' CLIPTokenizer of `folder`; None: CLIP's own vocabulary, padded with `pad`. Errors: `UserError`."""
    from transformers import CLIPTokenizer

    if folder is None:
        vocabulary, merges = stock_vocabulary()
        made = CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=EOS, model_max_length=77)
        # Only now: made with it, transformers would take each "!" of a caption for the mark, and not for the token at a
        # word's end.
        made.pad_token = pad
        return made
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"tokenizer folder {folder}: neither tokenizer.json nor vocab.json is in it; give a CLIP tokenizer's "
            "folder, or leave it out"
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
    """A printable letter for each byte, in the order of CLIP's vocabulary (byte-level BPE of GPT-2, Radford et al.
    2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def fingerprint(tokenizer: Any) -> str:
    """Hash of the vocabulary; a tokenizer that is made later knows it beforehand."""
    if hasattr(type(tokenizer), "fingerprint"):
        return str(tokenizer.fingerprint)
    return blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=8).hexdigest()


def is_stock(tokenizer: Any) -> bool:
    """Whether the tokenizer has a vocabulary that comes with sfumato."""
    vocabulary = tokenizer.get_vocab()
    stock: dict[int, Callable[[], Any]] = {
        49408: lambda: stock_vocabulary()[0],
        151665: lambda: _whole_qwen(qwen3=False),
        151669: lambda: _whole_qwen(qwen3=True),
        32100: lambda: t5_vocabulary(None).get_vocab(),
        1510: lambda: byt5_vocabulary(None).get_vocab(),
    }
    return len(vocabulary) in stock and bool(vocabulary == stock[len(vocabulary)]())


def padded(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Captions -> ids (b, length), cut or padded, and a mask (b, length), True where the tokens are."""
    import torch

    encoded = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask.to(torch.bool)


def limit(encoder: str, tokenizer: Any, tokens: int, raised_by: str = "") -> list[Limit]:
    """What an encoder takes of captions, for `TokenizeStrategy.limits`; nothing when its tokenizer is not there
    (None)."""
    from sfumato.data.strategies import Limit  # it imports torch

    return (
        []
        if tokenizer is None
        else [Limit(encoder=encoder, tokens=tokens, count=partial(_counts, tokenizer), raised_by=raised_by)]
    )


def _counts(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    # verbose: transformers warns of captions over the model's length, which are what is looked for.
    encoded = tokenizer(list(captions), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [len(ids) for ids in encoded.input_ids]


# --- T5 ---

T5_VOCABULARY = Path(__file__).with_name("t5_tokenizer")
"""The folder of T5's vocabulary that comes with sfumato; see the licence there."""
SENTINELS = 100
"""Tokens `<extra_id_0>` ... that follow the pieces in T5's vocabulary."""


def t5_tokenizer(folder: Path) -> Any:
    """transformers' T5Tokenizer of a folder with tokenizer.json or spiece.model; it ends a text with `</s>`. Errors:
    `UserError`."""
    from transformers import T5Tokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(
            f"tokenizer folder {folder}: neither tokenizer.json nor spiece.model is in it; give the folder of a T5 "
            "tokenizer"
        )
    try:
        if (folder / "tokenizer.json").is_file():
            return T5Tokenizer.from_pretrained(folder, local_files_only=True)
        # transformers needs two more libraries to read this small file.
        pieces, characters = _sentencepiece((folder / "spiece.model").read_bytes())
        marks = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
        return T5Tokenizer(vocab=[*pieces, *marks], extra_ids=SENTINELS, _spm_precompiled_charsmap=characters)
    except Exception as error:  # of a broken file the library, written in Rust, raises anything
        raise UserError(f"tokenizer folder {folder} cannot be read as T5's: {type(error).__name__}: {error}") from error


def t5_home() -> Path:
    """The folder of T5's vocabulary that comes with sfumato. For `TokenizerSpec.home`."""
    return T5_VOCABULARY


def t5_vocabulary(folder: Path | None) -> Any:
    """T5's tokenizer from a folder; None: with the vocabulary that T5, T5 v1.1 and Flan-T5 share. For
    `TokenizerSpec.make`."""
    return t5_tokenizer(folder or T5_VOCABULARY)


def _sentencepiece(data: bytes) -> tuple[list[tuple[str, float]], bytes | None]:
    """SentencePiece's ModelProto -> pieces with their scores, and the table by which characters are normalised.

    Fields, from sentencepiece_model.proto: 1 a piece (1 its text, 2 its score), 3 the normaliser (2 its table).
    """
    pieces: list[tuple[str, float]] = []
    characters = None
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
        elif number == 3:
            characters = dict(_fields(value)).get(2)
    return pieces, characters or None


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each field of a protocol buffer; numbers of variable length are passed over."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        key = number()
        kind = key & 7
        if kind == 0:
            number()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else number()
        start, at = at, at + size
        if at > len(message):
            raise ValueError("truncated")
        yield key >> 3, message[start:at]


# --- Gemma ---

GEMMA_HUB = "Alpha-VLLM/Lumina-Image-2.0"
"""Where Gemma-2's vocabulary is when no folder has it, in its folder `tokenizer`; Google's own is behind a login."""


def gemma_home() -> Path:
    """The hub's Gemma-2 tokenizer, downloaded. For `TokenizerSpec.home`."""
    return locate.local(GEMMA_HUB, "tokenizer", ("tokenizer/*",)) / "tokenizer"


def gemma_vocabulary(folder: Path | None) -> Any:
    """transformers' GemmaTokenizer of a folder with tokenizer.json, which begins a text with `<bos>`; None: the hub's.
    It pads and cuts at the end. For `TokenizerSpec.make`. Errors: `UserError`."""
    from transformers import GemmaTokenizer

    marks = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    return _of_folder(GemmaTokenizer, folder or gemma_home(), "Gemma", ("tokenizer.json",), marks)


def _of_folder(kind: Any, folder: Path, whose: str, files: Sequence[str], marks: Mapping[str, int | None]) -> Any:
    """A tokenizer of a folder that holds one of the files. `marks`: tokens that the vocabulary must have, in these
    places, or in any: transformers makes a tokenizer of this kind of many a folder that is another's."""
    if not any((folder / name).is_file() for name in files):
        raise UserError(
            f"tokenizer folder {folder}: no {' or '.join(files)} is in it; give the folder of a {whose} tokenizer"
        )
    try:
        made = kind.from_pretrained(folder, local_files_only=True, padding_side="right", truncation_side="right")
    except Exception as error:  # of a broken file the library, written in Rust, raises anything
        raise UserError(
            f"tokenizer folder {folder} cannot be read as {whose}'s: {type(error).__name__}: {error}"
        ) from error
    vocabulary = made.get_vocab()
    for mark, place in marks.items():
        if mark not in vocabulary or place not in (None, vocabulary[mark]):
            raise UserError(
                f"tokenizer folder {folder}: its vocabulary does not have {mark} where {whose}'s has it; give the "
                f"folder of a {whose} tokenizer"
            )
    return made


# --- Qwen ---

QWEN_MERGES = Path(__file__).with_name("qwen_bpe.txt.gz")
QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""Special tokens that follow the pieces in the vocabulary of Qwen2.5-VL and Qwen3, from 151643 on."""
QWEN_TOOLS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
"""Further tokens after these."""
QWEN3_TOOLS = ("<tool_response>", "</tool_response>", "<think>", "</think>")
"""Tokens that Qwen3 has after these, up to 151668."""


def qwen_home() -> Path:
    """The file of Qwen's vocabulary that comes with sfumato. For `TokenizerSpec.home`."""
    return QWEN_MERGES


def qwen_vocabulary(folder: Path | None, *, qwen3: bool = False) -> Any:
    """transformers' Qwen2Tokenizer of a folder with tokenizer.json or vocab.json; None: that of Qwen2.5-VL, or of Qwen3
    if `qwen3`. It adds no mark to a text, and pads and cuts at the end. For `TokenizerSpec.make`. Errors:
    `UserError`."""
    from transformers import AddedToken, Qwen2Tokenizer

    if folder is not None:
        return _of_folder(Qwen2Tokenizer, folder, "Qwen", ("tokenizer.json", "vocab.json"), {"<|im_start|>": None})
    vocabulary, merges = qwen_pieces()
    made = Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=131072, padding_side="right")
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    tools = (*QWEN_TOOLS, *(QWEN3_TOOLS if qwen3 else ()))
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in tools])
    made.eos_token = "<|im_end|>"  # only now: made with it, it would be the first token after the pieces
    return made


def qwen_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The pieces of all Qwens up to 3 {token: id}, and their merges in order."""
    with gzip.open(QWEN_MERGES, "rt", encoding="utf-8") as file:
        merges = [(first, second) for first, second in (line.split(" ") for line in file.read().splitlines())]
    return {token: i for i, token in enumerate((*byte_letters(), *(a + b for a, b in merges)))}, merges


def _whole_qwen(*, qwen3: bool) -> dict[str, int]:
    """The pieces and what follows them."""
    tokens = (*qwen_pieces()[0], *QWEN_SPECIAL, *QWEN_TOOLS, *(QWEN3_TOOLS if qwen3 else ()))
    return {token: i for i, token in enumerate(tokens)}


# --- byT5 ---

COLOURS = 138
FONTS = {"en": 512, "cn": 143, "jp": 211, "kr": 122}
"""Tokens that Glyph-ByT5-v2 has after byT5's, as `<color-0>` and `<en-font-0>`, in this order."""


def byt5_home() -> Path:
    """This file: nothing else is read. For `TokenizerSpec.home`."""
    return Path(__file__)


def byt5_vocabulary(folder: Path | None) -> Any:
    """transformers' ByT5Tokenizer of a folder; None: byT5's bytes and the tokens of Glyph-ByT5-v2. It ends a text with
    `</s>`. For `TokenizerSpec.make`. Errors: `UserError`."""
    from transformers import ByT5Tokenizer

    if folder is not None:
        return _of_folder(ByT5Tokenizer, folder, "byT5", ("tokenizer_config.json",), {"<pad>": 0, "</s>": 1})
    made = ByT5Tokenizer()
    fonts = [f"<{language}-font-{i}>" for language, count in FONTS.items() for i in range(count)]
    made.add_tokens([*(f"<color-{i}>" for i in range(COLOURS)), *fonts], special_tokens=True)
    return made
