"""The strategies of Chroma: captions through T5 alone, of whose padding the transformer attends to one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sfumato.data.batch import Cond, Tokens
from sfumato.data.strategies import Limit
from sfumato.families.flux.strategies import outputs, t5_settings, t5_states, t5_tokens
from sfumato.models.encoders.tokenizers import limit

PADDING_SEEN = 1
"""So Chroma was trained: https://huggingface.co/lodestones/Chroma, "masking T5 padding tokens"."""
OUTPUTS = outputs(masked=True, fields=("t5",), padding=PADDING_SEEN)


@dataclass(frozen=True)
class ChromaTokenize:
    """Captions -> tokens of T5, as `flux.strategies.t5_tokens` has them."""

    t5: Any
    length: int
    """The most tokens of a caption, its end mark included; further ones are cut."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the tokens depend on besides the caption."""
        return t5_settings(self.t5, self.length, masked=True)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """See the class."""
        return t5_tokens(self.t5, captions, self.length, masked=True, padding=PADDING_SEEN)

    def limits(self) -> list[Limit]:
        """T5's."""
        return limit("T5", self.t5, self.length - 1, "t5xxl_max_token_length")


@dataclass(frozen=True)
class ChromaEncode:
    """Tokens -> {"t5": (b, n, 4096)}, and {"t5_mask": (b, n)}, true for what the transformer attends to,
    where that is not all."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the states depend on besides tokens and encoders."""
        return {"padding seen": PADDING_SEEN}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class. In T5 the padding attends to the caption, and nothing to the padding."""
        return t5_states(encoders["t5xxl"], tokens)
