"""The strategies of Anima: captions through Qwen3, and as T5's tokens, which the denoiser's text adapter takes.

Both are kept without padding. The adapter is part of the denoiser and runs with it, so that it can be trained on what
is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.batch import Cond, Tokens
from sfumato.data.strategies import (
    KohyaLatents,
    KohyaOutputs,
    LatentsCachingStrategy,
    Limit,
    TextEncoderOutputsCachingStrategy,
)
from sfumato.families.anima.net import PATCH
from sfumato.models.encoders.tokenizers import fingerprint, limit

LATENTS = LatentsCachingStrategy(
    channels=16, patch=PATCH, frames=True, kohya=KohyaLatents(suffixes=("_anima.npz",), scaled=True)
)


def _kohyas(arrays: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {"qwen3": ("prompt_embeds", "attn_mask"), "t5_ids": ("t5_input_ids", "t5_attn_mask")}
    return {name: arrays[states][arrays[mask] > 0] for name, (states, mask) in parts.items()}


OUTPUTS = TextEncoderOutputsCachingStrategy(
    fields=("qwen3", "qwen3_mask", "t5_ids", "t5_mask"),
    ragged={"qwen3": "qwen3_mask", "t5_ids": "t5_mask"},
    lengths={"qwen3": 1},  # an empty caption has no token for Qwen3, and a row of zeros for the adapter
    dtype=torch.bfloat16,
    kohya=KohyaOutputs(suffix="_anima_te.npz", read=_kohyas),
)
"""In bf16, which Qwen3 is published in; T5's tokens as whole numbers."""


@dataclass(frozen=True)
class AnimaTokenize:
    """Captions -> {"qwen3": (b, n), "t5": (b, m)}, and where their tokens are, "..._mask"; n and m are what the longest
    caption needs, and at least 1."""

    qwen3: Any
    t5: Any
    qwen3_length: int
    """The most tokens for Qwen3, which has no marks."""
    t5_length: int
    """The most tokens of T5, the end mark included."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the tokens depend on besides the caption."""
        return {
            "qwen3": fingerprint(self.qwen3),
            "qwen3_max_token_length": self.qwen3_length,
            "t5": fingerprint(self.t5),
            "t5_max_token_length": self.t5_length,
        }

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """See the class."""
        out: dict[str, Tensor] = {}
        for name, tokenizer, most in (("qwen3", self.qwen3, self.qwen3_length), ("t5", self.t5, self.t5_length)):
            rows = tokenizer(list(captions), truncation=True, max_length=most).input_ids
            n = max(1, *map(len, rows))
            ids = [[*row, *[tokenizer.pad_token_id] * (n - len(row))] for row in rows]
            out |= {name: torch.tensor(ids), f"{name}_mask": torch.arange(n) < torch.tensor([[len(r)] for r in rows])}
        return out

    def limits(self) -> list[Limit]:
        """Each reads the whole caption."""
        return limit("Qwen3", self.qwen3, self.qwen3_length, "qwen3_max_token_length") + limit(
            "T5", self.t5, self.t5_length - 1, "t5_max_token_length"
        )


@dataclass(frozen=True)
class AnimaEncode:
    """Tokens -> {"qwen3": (b, n, 1024), the last states, zero where padding is, "t5_ids": (b, m)}, and their masks
    "qwen3_mask" and "t5_mask"."""

    @property
    def settings(self) -> Mapping[str, object]:
        """Nothing but tokens and encoder makes the states."""
        return {}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class."""
        net = encoders["qwen3"]
        device = next(net.parameters()).device
        ids, mask, t5_ids, t5_mask = (tokens[name].to(device) for name in ("qwen3", "qwen3_mask", "t5", "t5_mask"))
        states: Tensor = net(ids, mask, -1)
        shown = states.masked_fill(~mask[..., None], 0)
        return {"qwen3": shown, "qwen3_mask": mask, "t5_ids": t5_ids, "t5_mask": t5_mask}
