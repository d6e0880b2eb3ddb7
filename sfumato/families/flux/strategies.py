"""The four strategies of FLUX.1: captions through CLIP-L, of which the pooled state is used, and through T5."""

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
from sfumato.families.flux.net import PATCH
from sfumato.models.encoders.tokenizers import fingerprint, limit, padded

CLIP_LENGTH = 77
"""Tokens of a caption for CLIP, marks included."""

LATENTS = LatentsCachingStrategy(channels=16, patch=PATCH, kohya=KohyaLatents(suffixes=("_flux.npz",), scaled=True))


def outputs(
    *, masked: bool, fields: Sequence[str] = ("pooled", "t5"), padding: int = 0
) -> TextEncoderOutputsCachingStrategy:
    """What is cached of captions. `masked`: no token attends to T5's padding, which is not cached, but for so many
    tokens as `padding`; else it is part of the net's input.

    In bf16, which T5 itself is published in: its states pass fp16's range.
    """

    def kohyas(arrays: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        if bool(arrays["apply_t5_attn_mask"]) != masked:
            return None
        used = int(arrays["t5_attn_mask"].sum()) + padding if masked else None
        found = {"pooled": arrays["l_pooled"], "t5": arrays["t5_out"][:used]}
        return {name: found[name] for name in fields}

    return TextEncoderOutputsCachingStrategy(
        fields=(*fields, "t5_mask") if masked else tuple(fields),
        ragged={"t5": "t5_mask"} if masked else {},
        dtype=torch.bfloat16,
        kohya=KohyaOutputs(suffix="_flux_te.npz", read=kohyas),
    )


@dataclass(frozen=True)
class FluxTokenize:
    """Captions -> {"clip_l": (b, 77), "t5": (b, n)}, cut or padded, and what `t5_tokens` adds where padding is
    hidden."""

    clip_l: Any
    t5: Any
    length: int
    """n, T5's tokens of a caption, its end mark included."""
    masked: bool = False

    @property
    def settings(self) -> Mapping[str, object]:
        """What the tokens depend on besides the caption."""
        return {
            "clip_l": fingerprint(self.clip_l),
            "clip_l pad": self.clip_l.pad_token_id,
            **t5_settings(self.t5, self.length, masked=self.masked),
        }

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """See the class."""
        ids, _ = padded(self.clip_l, captions, CLIP_LENGTH)
        return {"clip_l": ids, **t5_tokens(self.t5, captions, self.length, masked=self.masked)}

    def limits(self) -> list[Limit]:
        """T5 reads on where CLIP ends."""
        return limit("CLIP", self.clip_l, CLIP_LENGTH - 2) + limit(
            "T5", self.t5, self.length - 1, "t5xxl_max_token_length"
        )


@dataclass(frozen=True)
class FluxEncode:
    """Tokens -> {"pooled": (b, 768), "t5": (b, n, 4096)}, and {"t5_mask": (b, n)} where padding is hidden and there is
    some.

    Without the mask T5 attends to the padding as well, whose states are part of the net's input: so the
    published models were trained.
    """

    @property
    def settings(self) -> Mapping[str, object]:
        """Nothing but tokens and encoders makes the states."""
        return {}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class."""
        clip_l = encoders["clip_l"]
        pooled: Tensor = clip_l(tokens["clip_l"].to(next(clip_l.parameters()).device)).pooled
        return {"pooled": pooled, **t5_states(encoders["t5xxl"], tokens)}


def t5_settings(tokenizer: Any, length: int, *, masked: bool) -> dict[str, object]:
    """What T5's tokens depend on besides the caption."""
    return {"t5": fingerprint(tokenizer), "t5xxl_max_token_length": length, "apply_t5_attn_mask": masked}


def t5_tokens(
    tokenizer: Any, captions: Sequence[str], length: int, *, masked: bool, padding: int = 0
) -> dict[str, Tensor]:
    """Captions -> {"t5": (b, length)}. With `masked` {"t5": (b, n), "t5_mask": (b, n)}, the mask true for tokens, where
    n is what the longest caption needs, and {"t5_visible": (b, n)} if the transformer attends to less than that.

    `padding`: how many tokens of padding the transformer attends to. Decided here, on the CPU, so that no step waits
    for the device.
    """
    ids, used = padded(tokenizer, captions, length)
    if not masked:
        return {"t5": ids}
    counts = (used.sum(1, keepdim=True) + padding).clamp(max=length)
    n = int(counts.max())
    tokens = {"t5": ids[:, :n], "t5_mask": used[:, :n]}
    return tokens if int(counts.min()) == n else tokens | {"t5_visible": torch.arange(n) < counts}


def t5_states(net: nn.Module, tokens: Tokens) -> dict[str, Tensor]:
    """Tokens of `t5_tokens` -> {"t5": (b, n, d)}, and {"t5_mask": (b, n)} where it hides something; hidden rows are
    zero."""
    device = next(net.parameters()).device
    ids, mask, visible = (
        tokens[name].to(device) if name in tokens else None for name in ("t5", "t5_mask", "t5_visible")
    )
    states: Tensor = net(ids, mask)
    return {"t5": states} if visible is None else {"t5": states.masked_fill(~visible[..., None], 0), "t5_mask": visible}
