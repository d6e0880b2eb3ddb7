"""Captions of HunyuanImage-2.1 on their way through Qwen2.5-VL, and what they have in quotes through byT5."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

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

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>"
)
"""What Qwen2.5-VL reads."""
DROPPED = 34
"""Tokens of it before the caption, whose states are not used."""
LENGTH = 1000
"""The most tokens behind these, as HunyuanImagePipeline has it; sd-scripts takes 1024."""
GLYPHS_LENGTH = 128
"""The most tokens for byT5, its end mark included."""
HIDDEN = -3
"""Which of Qwen2.5-VL's states are used."""
QUOTES = (r"'(.*?)'", r'"(.*?)"', "‘(.*?)’", "“(.*?)”")
"""What is to be written in the image, in the order in which byT5 reads it."""

LATENTS = LatentsCachingStrategy(channels=64, stride=32, kohya=KohyaLatents(suffixes=("_hi.npz",)))


def _kohyas(arrays: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {"text": ("vlm_embed", "vlm_mask"), "glyphs": ("byt5_embed", "byt5_mask")}
    return {name: arrays[states][arrays[mask] > 0] for name, (states, mask) in parts.items()}


# Qwen2.5-VL's states pass fp16's range.
OUTPUTS = TextEncoderOutputsCachingStrategy(
    fields=("text", "text_mask", "glyphs", "glyphs_mask"),
    ragged={"text": "text_mask", "glyphs": "glyphs_mask"},
    dtype=torch.bfloat16,
    kohya=KohyaOutputs(suffix="_hi_te.npz", read=_kohyas),
)


def quoted(caption: str) -> str:
    """What byT5 reads of a caption: `Text "x". Text "y". `, or nothing. An apostrophe is taken for a quote, as by the
    pipeline, which the model knows so."""
    found = [text for pattern in QUOTES for text in re.findall(pattern, caption)]
    return "".join(f'Text "{text}". ' for text in found)


@dataclass(frozen=True)
class HunyuanTokenize:
    """Captions -> {"text": (b, n), "text_mask": (b, n), "glyphs": (b, m), "glyphs_mask": (b, m)}, masks True for
    tokens, where n and m are what the longest caption needs; m is 0 where none has quotes."""

    qwen: Any
    byt5: Any

    @property
    def settings(self) -> Mapping[str, object]:
        """What the tokens depend on besides the caption."""
        return {
            "qwen25vl": fingerprint(self.qwen),
            "byt5": fingerprint(self.byt5),
            "template": TEMPLATE,
            "length": LENGTH,
        }

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """See the class. Where it ends is decided here, on the CPU, so that no step waits for the device."""
        ids, used = padded(self.qwen, [TEMPLATE.format(caption) for caption in captions], DROPPED + LENGTH)
        texts = [quoted(caption) for caption in captions]
        glyphs, shown = padded(self.byt5, texts, GLYPHS_LENGTH)
        shown = shown & torch.tensor([bool(text) for text in texts])[:, None]
        n, m = (int(mask.sum(1).max()) for mask in (used, shown))
        return {"text": ids[:, :n], "text_mask": used[:, :n], "glyphs": glyphs[:, :m], "glyphs_mask": shown[:, :m]}

    def limits(self) -> list[Limit]:
        """Qwen's, less what the template takes behind the caption, and byT5's of what is in quotes."""
        (qwen,), (byt5,) = limit("Qwen2.5-VL", self.qwen, LENGTH), limit("byT5", self.byt5, GLYPHS_LENGTH - 1)
        (around,) = qwen.count([TEMPLATE.format("")])
        return [
            replace(qwen, tokens=DROPPED + LENGTH - around),
            replace(
                byt5, encoder="byT5 (text in quotes)", count=lambda captions: byt5.count([quoted(c) for c in captions])
            ),
        ]


@dataclass(frozen=True)
class HunyuanEncode:
    """Tokens -> {"text": (b, n - 34, d), "glyphs": (b, m, e)}, and {"text_mask": (b, n - 34)}, {"glyphs_mask": (b, m)}
    where there is padding, whose rows are zero."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the states depend on besides tokens and encoders."""
        return {"hidden": HIDDEN}

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """See the class."""
        text = encoders["qwen25vl"](*_on(encoders["qwen25vl"], tokens["text"], tokens["text_mask"]), HIDDEN)
        return {
            **_visible("text", text[:, DROPPED:], tokens["text_mask"][:, DROPPED:]),
            **_visible("glyphs", self._glyphs(encoders["byt5"], tokens), tokens["glyphs_mask"]),
        }

    def _glyphs(self, net: nn.Module, tokens: Tokens) -> Tensor:
        """(b, m, e). Rows without a token are read as they are, for an attention must have something to attend to."""
        ids, mask = _on(net, tokens["glyphs"], tokens["glyphs_mask"] | ~tokens["glyphs_mask"].any(1, keepdim=True))
        if not ids.shape[1]:
            weight = next(net.parameters())
            return weight.new_zeros(*ids.shape, cast(Any, net).config.d_model)
        states: Tensor = net(ids, mask)
        return states


def _on(net: nn.Module, *tensors: Tensor) -> list[Tensor]:
    """Tensors on the net's device."""
    device = next(net.parameters()).device
    return [t.to(device) for t in tensors]


def _visible(name: str, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """{name: (b, n, d)}, zero where the mask (b, n) is False, and then the mask as well; without it where all is used,
    if that can be told without waiting for a device."""
    if mask.device.type == "cpu" and bool(mask.all()):
        return {name: states}
    mask = mask.to(states.device)
    return {name: states.masked_fill(~mask[..., None], 0), f"{name}_mask": mask}
