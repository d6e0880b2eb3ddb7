"""Tiny language models that encode text, and byT5, with random weights, from transformers' classes; their tokenizers with small vocabularies.

As `encoders.py`: sizes are the real ones' in small, names and layout the real ones'; in eval mode, shared, not to be changed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import (
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from sfumato.models.encoders.tokenizers import QWEN_SPECIAL, byt5_vocabulary, byte_letters
from tinies.encoders import randomised

GEMMA_WIDTH, QWEN3_WIDTH, QWEN25VL_WIDTH, BYT5_WIDTH = 48, 40, 256, 72
"""Of their states."""
WORDS = ("cat", "dog", "red", "photo", "mat", "girl")


@cache
def gemma2() -> Any:
    """Gemma-2 as Lumina Image 2.0 has it."""
    config = Gemma2Config(
        vocab_size=len(gemma_tokenizer()) + 3,
        hidden_size=GEMMA_WIDTH,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
    )
    return randomised(11, lambda: Gemma2Model(config))


@cache
def qwen3() -> Any:
    """Qwen3 as Anima has it."""
    config = Qwen3Config(**qwen_sizes(QWEN3_WIDTH), head_dim=128, rope_parameters=ROPE)
    return randomised(12, lambda: Qwen3Model(config))


@cache
def qwen25vl() -> Any:
    """Qwen2.5-VL as HunyuanImage has it, with what reads images."""
    # A head has the width over the number of heads here, which is 128 as in the real one.
    text = {**qwen_sizes(QWEN25VL_WIDTH), "rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]}}
    seeing = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": QWEN25VL_WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**seeing, "fullatt_block_indexes": [0]})
    return randomised(13, lambda: Qwen2_5_VLForConditionalGeneration(config))


@cache
def byt5() -> Any:
    """byT5's encoder with the rows of Glyph-ByT5's tokens."""
    config = T5Config(
        vocab_size=len(byt5_tokenizer()),
        d_model=BYT5_WIDTH,
        d_kv=64,
        d_ff=96,
        num_layers=3,
        num_heads=2,
        relative_attention_num_buckets=16,
        feed_forward_proj="gated-gelu",
    )
    return randomised(14, lambda: T5EncoderModel(config))


ROPE = {"rope_type": "default", "rope_theta": 1e6}


def qwen_sizes(width: int) -> dict[str, Any]:
    """Of a Qwen's config; there are more rows in the embedding than tokens, as in the real ones."""
    end = qwen_tokenizer().eos_token_id
    return {
        "vocab_size": len(qwen_tokenizer()) + 7,
        "hidden_size": width,
        "intermediate_size": 88,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "bos_token_id": end,
        "eos_token_id": end,
    }


@cache
def qwen_tokenizer() -> Any:
    """Qwen's tokenizer with all bytes, a few words, and the real one's special tokens after them."""
    vocabulary, merges = byte_pairs("Ġ", byte_letters())
    made = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    made.add_tokens(list(QWEN_SPECIAL), special_tokens=True)
    return made


@cache
def gemma_tokenizer() -> Any:
    """Gemma's tokenizer with the letters, a few words and all bytes."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256)), "\n"]
    vocabulary, merges = byte_pairs("▁", [*marks, "▁", *map(chr, range(ord("!"), ord("~") + 1))])
    return GemmaTokenizer(vocab=vocabulary, merges=merges, padding_side="right", add_bos_token=True)


@cache
def byt5_tokenizer() -> ByT5Tokenizer:
    """byT5's own: it is small."""
    made: ByT5Tokenizer = byt5_vocabulary(None)
    return made


def byte_pairs(space: str, letters: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of letters and `WORDS`, each after a space, and its merges in order."""
    merges = dict.fromkeys((space + word[:i], word[i]) for word in WORDS for i in range(len(word)))
    tokens = [*letters, *(a + b for a, b in merges)]
    return {token: i for i, token in enumerate(tokens)}, list(merges)
