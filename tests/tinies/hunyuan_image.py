"""Tiny HunyuanImage-2.1 models with random weights, from diffusers' and transformers' classes: the base model and the
distilled one.

Sizes are the real ones' in small and differ from one another; names and layout are the real ones'. They are in eval
mode and shared between tests: not to be changed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from diffusers import HunyuanImageTransformer2DModel

from tinies.encoders import randomised

TEXT_WIDTH, GLYPHS_WIDTH = 96, 80
"""Of the states of Qwen2.5-VL and of byT5."""
HEAD = 32


@cache
def transformer(*, distilled: bool = False) -> Any:
    """As the base model, or as the distilled one, which takes a guidance and the time of the next step."""
    return randomised(
        6,
        lambda: HunyuanImageTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=HEAD,
            num_layers=2,
            num_single_layers=3,
            num_refiner_layers=2,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=GLYPHS_WIDTH,
            rope_axes_dim=(HEAD // 2, HEAD // 2),
            guidance_embeds=distilled,
            use_meanflow=distilled,
        ),
    )
