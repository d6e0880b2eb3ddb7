"""Captions of Lumina Image 2.0 on their way through Gemma-2, whose states are cached without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from sfumato.families.lumina2.net import PATCH
from sfumato.models.encoders.tokenizers import fingerprint, limit, padded

START = " <Prompt Start> "
"""What stands between the system prompt and a caption."""
PENULTIMATE = -2
"""Which of Gemma's states are used."""

LATENTS = LatentsCachingStrategy(channels=16, patch=PATCH, kohya=KohyaLatents(suffixes=("_lumina.npz",), scaled=True))


def _kohyas(arrays: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"gemma2": arrays["hidden_state"][arrays["attention_mask"] > 0]}


# Gemma's states pass fp16's range.
OUTPUTS = TextEncoderOutputsCachingStrategy(
    fields=("gemma2", "gemma2_mask"),
    ragged={"gemma2": "gemma2_mask"},
    dtype=torch.bfloat16,
    kohya=KohyaOutputs(suffix="_lumina_te.npz", read=_kohyas),
)


@dataclass(frozen=True)
class LuminaTokenize:
    """Captions -> {"gemma2": (b, n)}, where n is what the longest caption needs, and {"gemma2_mask": (b, n)}, True for
    tokens, where there is padding."""

    tokenizer: Any
    length: int
    """The most tokens of a caption, its start mark included; further ones are cut."""
    system: str | None = None
    """What is read before captions that are not empty: an empty one stands for no caption, which is what samples are
    guided away from."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the tokens depend on besides the caption."""
        return {
            "gemma2": fingerprint(self.tokenizer),
            "gemma2_max_token_length": self.length,
            "system_prompt": self.system or "",
        }

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """See the class. Where padding is is decided here, on the CPU, so that no step waits for the device."""
        ids, used = padded(self.tokenizer, [self._before(caption) + caption for caption in captions], self.length)
        counts = used.sum(1)
        n = int(counts.max())
        masked = {} if int(counts.min()) == n else {"gemma2_mask": used[:, :n]}
        return {"gemma2": ids[:, :n], **masked}

    def limits(self) -> list[Limit]:
        """Gemma's, less what the system prompt takes. Both are counted as one text, the first word of a caption being
        another token after a space."""
        (own,) = limit("Gemma", self.tokenizer, self.length - 1, "gemma2_max_token_length")
        (before,) = own.count([self._before("a caption")])

        def count(captions: Sequence[str]) -> list[int]:
            return [n - before for n in own.count([self._before(caption) + caption for caption in captions])]

        return [replace(own, tokens=max(own.tokens - before, 0), count=count)]

    def _before(self, caption: str) -> str:
        return self.system + START if self.system and caption else ""


@dataclass(frozen=True)
class LuminaEncode:
    """Tokens -> {"gemma2": (b, n, d)}, and {"gemma2_mask": (b, n)} where there is padding, whose rows are zero."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the states depend on besides tokens and encoders."""
        return {"hidden": PENULTIMATE}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class."""
        net = encoders["gemma2"]
        device, mask = next(net.parameters()).device, tokens.get("gemma2_mask")
        if mask is None:
            return {"gemma2": net(tokens["gemma2"].to(device), None, PENULTIMATE)}
        mask = mask.to(device)
        states: Tensor = net(tokens["gemma2"].to(device), mask, PENULTIMATE)
        return {"gemma2": states.masked_fill(~mask[..., None], 0), "gemma2_mask": mask}
