"""Make the model in the box's tokenizer: CLIP's format, with the captions' words as whole tokens and letters for all
others."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from pictures import FORMS, captions

from sfumato.models.encoders.tokenizers import byte_letters

END = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
LENGTH = 77
STYLE_WORDS = """
line art lines lineart drawing drawn sketch ink pencil pen black white grey gray colour color colourful monochrome
outline outlines
style styled simple flat bright dark light soft photo photograph painting painted watercolour cartoon icon sticker
logo emoji picture
image illustration pixel pastel neon minimal detailed background plain beautiful cute happy sad big small large tiny
old new
red green blue yellow orange purple pink brown gold silver
a an the of in on with and or at by for from to no not is are one two three many sks
"""
"""Words that prompts for this model are likely to hold beside its names."""


def words() -> list[str]:
    """Every word of the captions and of STYLE_WORDS."""
    texts = [name.lower() for _, name in captions()] + list(FORMS)
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text)} | set(STYLE_WORDS.split()))


def merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word: the most frequent pair first, of equals the first in the
    alphabet."""
    pieces = [[*word[:-1], word[-1] + END] for word in vocabulary]
    out = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        pieces = [joined(word, best) for word in pieces]
        out.append(best)
    return out


def joined(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The word's pieces with every such pair made one."""
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/tokenizer"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = merges(words())
    letters = byte_letters()
    tokens = [*letters, *(letter + END for letter in letters), *dict.fromkeys(a + b for a, b in pairs), *SPECIAL]
    start, end = SPECIAL
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]) + "\n",
        "special_tokens_map.json": json.dumps(
            {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}, indent=2
        ),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": LENGTH,
                "do_lower_case": True,
                "bos_token": start,
                "eos_token": end,
                "pad_token": end,
                "unk_token": end,
            },
            indent=2,
        ),
    }
    for name, text in files.items():
        (args.out / name).write_text(text)
    print(f"{len(tokens)} tokens, {len(words())} words in {args.out}")


if __name__ == "__main__":
    main()
