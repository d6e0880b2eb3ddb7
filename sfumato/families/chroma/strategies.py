"""The strategies of Chroma: captions through T5 alone, of whose padding the transformer sees one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.batch import Cond, Tokens
from sfumato.families.flux.strategies import outputs, t5_settings, t5_tokens

OUTPUTS = outputs(masked=True, fields=("t5",))


@dataclass(frozen=True)
class ChromaTokenize:
    """Captions -> {"t5": (b, n), "t5_mask": (b, n)}, the mask true where tokens are; n is what the longest caption needs."""

    t5: Any
    length: int
    """The most tokens of a caption, its end mark included; further ones are cut."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the tokens depend on besides the caption."""
        return t5_settings(self.t5, self.length, masked=True)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """See the class."""
        tokens = t5_tokens(self.t5, captions, self.length, masked=True)
        used = int(seen(tokens["t5_mask"]).sum(1).max())
        return {name: t[:, :used] for name, t in tokens.items()}


@dataclass(frozen=True)
class ChromaEncode:
    """Tokens -> {"t5": (b, n, 4096), "t5_mask": (b, n)}, the mask true for what the transformer sees."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the states depend on besides tokens and encoders."""
        return {"padding seen": 1}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class. In T5 the padding sees the caption, and nothing sees the padding."""
        net = encoders["t5xxl"]
        ids, mask = (tokens[name].to(next(net.parameters()).device) for name in ("t5", "t5_mask"))
        return {"t5": net(ids, mask), "t5_mask": seen(mask)}


def seen(mask: Tensor) -> Tensor:
    """Where tokens are (b, n) -> what the transformer sees (b, n): these, and the first of the padding if there is any.

    So Chroma was trained: https://huggingface.co/lodestones/Chroma, "masking T5 padding tokens".
    """
    return torch.arange(mask.shape[1], device=mask.device) <= mask.sum(1, keepdim=True)
