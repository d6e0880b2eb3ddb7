"""Captions of Stable Diffusion 3 on their way through both CLIPs and T5; the output of each is cached by itself."""

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
from sfumato.models.encoders.tokenizers import fingerprint, limit, padded

CLIPS = ("clip_l", "clip_g")
CLIP_LENGTH = 77
"""Tokens of a caption for both CLIPs, marks included."""
PENULTIMATE = 2
"""The layer from the end whose states are used."""

LATENTS = LatentsCachingStrategy(channels=16, patch=2, kohya=KohyaLatents(suffixes=("_sd3.npz",)))


def outputs(*, t5: bool, length: int, masked: bool, masked_clips: bool) -> TextEncoderOutputsCachingStrategy:
    """What is cached of captions. `t5`: whether there is one; `masked`: its padding is not cached, and comes back as
    zeros up to `length`; `masked_clips`: that of both CLIPs is zero.

    In bf16, which has the range of what T5 was published in.
    """

    def kohyas(arrays: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        if (bool(arrays["apply_lg_attn_mask"]), bool(arrays["apply_t5_attn_mask"])) != (masked_clips, masked):
            return None
        found: dict[str, Tensor] = {}
        n, m = like["clip_l"].shape[-1], like["clip_l_pooled"].shape[-1]  # CLIP-L's numbers stand before CLIP-G's
        for name, part, pooled in (("clip_l", slice(n), slice(m)), ("clip_g", slice(n, None), slice(m, None))):
            states = arrays["lg_out"][:, part]
            found[name] = states * (arrays[f"{name}_attn_mask"][:, None] > 0) if masked_clips else states
            found[f"{name}_pooled"] = arrays["lg_pooled"][pooled]
        if t5:
            found["t5"] = arrays["t5_out"][: int(arrays["t5_attn_mask"].sum()) if masked else None]
        return found

    clips = tuple(name for clip in CLIPS for name in (clip, f"{clip}_pooled"))
    return TextEncoderOutputsCachingStrategy(
        fields=(*clips, *(("t5",) if t5 else ()), *(("t5_mask",) if t5 and masked else ())),
        ragged={"t5": "t5_mask"} if t5 and masked else {},
        lengths={"t5": length} if t5 and masked else {},
        dtype=torch.bfloat16,
        kohya=KohyaOutputs(suffix="_sd3_te.npz", read=kohyas),
    )


@dataclass(frozen=True)
class Sd3Tokenize:
    """Captions -> {"clip_l": (b, 77), "clip_g": (b, 77), "t5": (b, n)}, cut or padded, and masks "..._mask" where
    padding is hidden."""

    clips: Mapping[str, Any]
    """The tokenizers of both CLIPs, by name; their vocabularies are the same, what they pad with is not."""
    t5: Any | None
    length: int
    """n, T5's tokens of a caption, its end mark included."""
    masked_clips: bool = False
    masked_t5: bool = False

    @property
    def settings(self) -> Mapping[str, object]:
        """What the tokens depend on besides the caption."""
        clips = {name: [fingerprint(each), each.pad_token_id] for name, each in self.clips.items()}
        t5 = {"t5": fingerprint(self.t5), "t5xxl_max_token_length": self.length} if self.t5 else {}
        return {**clips, **t5, "apply_lg_attn_mask": self.masked_clips, "apply_t5_attn_mask": self.masked_t5}

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """See the class."""
        tokens: dict[str, Tensor] = {}
        read = [(name, each, CLIP_LENGTH, self.masked_clips) for name, each in self.clips.items()]
        for name, tokenizer, length, masked in [*read, ("t5", self.t5, self.length, self.masked_t5)]:
            if tokenizer is not None:
                tokens[name], used = padded(tokenizer, captions, length)
                tokens |= {f"{name}_mask": used} if masked else {}
        return tokens

    def limits(self) -> list[Limit]:
        """T5 reads on where both CLIPs end."""
        clip = limit("CLIP", next(iter(self.clips.values())), CLIP_LENGTH - 2)
        return clip + limit("T5", self.t5, self.length - 1, "t5xxl_max_token_length")


@dataclass(frozen=True)
class Sd3Encode:
    """Tokens -> {"clip_l": (b, 77, 768), "clip_l_pooled": (b, 768), "clip_g": (b, 77, 1280), "clip_g_pooled": (b,
    1280), "t5": (b, n, 4096)}, and {"t5_mask": (b, n)} if the tokens have it.

    States are zero where a mask says so. Without one, padding is content like any other: so pipelines run these models.
    """

    @property
    def settings(self) -> Mapping[str, object]:
        """Nothing but tokens and encoders makes the states."""
        return {}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class."""
        cond: dict[str, Tensor] = {}
        for name in CLIPS:
            net = encoders[name]
            ids, mask = _on(net, tokens, name)
            out = net(ids, PENULTIMATE)
            cond |= {name: _visible(out.states, mask), f"{name}_pooled": out.projected}
        if "t5" in tokens:
            ids, mask = _on(encoders["t5xxl"], tokens, "t5")
            cond["t5"] = _visible(encoders["t5xxl"](ids, mask), mask)
            cond |= {} if mask is None else {"t5_mask": mask}
        return cond


def _on(net: nn.Module, tokens: Tokens, name: str) -> tuple[Tensor, Tensor | None]:
    """Ids and mask, if there is one, on the net's device."""
    device, mask = next(net.parameters()).device, tokens.get(f"{name}_mask")
    return tokens[name].to(device), None if mask is None else mask.to(device)


def _visible(states: Tensor, mask: Tensor | None) -> Tensor:
    """(b, n, d), zero where the mask (b, n) is False."""
    return states if mask is None else states.masked_fill(~mask[..., None], 0)
