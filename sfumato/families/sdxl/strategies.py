"""The four strategies of Stable Diffusion XL: captions go through both text encoders, whose states stand side by
side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

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
from sfumato.families.sd.strategies import SdTokenize, join
from sfumato.models.encoders.clip import ClipOutput

LAYER = 2
"""The layer whose states are used, from the end; no norm follows."""
LATENTS = LatentsCachingStrategy(kohya=KohyaLatents(suffixes=("_sdxl.npz",), plain=True))


def _kohyas(arrays: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"hidden": torch.cat([arrays["hidden_state1"], arrays["hidden_state2"]], -1), "pooled": arrays["pool2"]}


OUTPUTS = TextEncoderOutputsCachingStrategy(
    fields=("hidden", "pooled"), kohya=KohyaOutputs(suffix="_te_outputs.npz", read=_kohyas)
)


@dataclass(frozen=True)
class SdxlTokenize:
    """Captions -> {"clip_l_ids", "clip_g_ids": (b, chunks, 77)}, and {"clip_l_weights", ...} for weighted captions."""

    encoders: Mapping[str, SdTokenize]
    """By text encoder."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the tokens depend on besides the caption."""
        return {f"{name} {key}": value for name, each in self.encoders.items() for key, value in each.settings.items()}

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """See the class."""
        return {
            f"{name}_{key}": t for name, each in self.encoders.items() for key, t in each.tokenize(captions).items()
        }

    def limits(self) -> list[Limit]:
        """Both encoders read the same words; what they pad with is not counted."""
        return next(iter(self.encoders.values())).limits()


@dataclass(frozen=True)
class SdxlEncode:
    """Tokens -> {"hidden": (b, 75 * chunks + 2, d of CLIP-L + d of bigG), "pooled": (b, p) bigG's pooled state of the
    whole caption}."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the states depend on besides tokens and encoders: nothing."""
        return {}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class. Each chunk is encoded by itself; the first one's pooled text stands for the caption."""
        first, _ = _said(encoders, "clip_l", tokens)
        second, pooled = _said(encoders, "clip_g", tokens)
        return {"hidden": torch.cat([first, second], -1), "pooled": pooled}


def _said(encoders: Mapping[str, nn.Module], name: str, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """States (b, 75 * chunks + 2, d) and pooled text (b, p) of one encoder."""
    net = encoders[name]
    device = next(net.parameters()).device
    ids = tokens[f"{name}_ids"].to(device)
    out = cast(ClipOutput, net(ids.flatten(0, 1), LAYER))
    states, pooled = (t.reshape(*ids.shape[:2], *t.shape[1:]) for t in (out.states, out.projected))
    if (weights := tokens.get(f"{name}_weights")) is not None:
        # The mean is not restored afterwards, and the pooled text has no words to weigh, as in sd-scripts' training.
        states = states * weights.to(device, states.dtype)[..., None]
    return join(states), pooled[:, 0]
