"""Lumina Image 2.0 in small, with random weights from diffusers' and transformers' classes.

Sizes are the real ones' in small and differ from one another; names and layout are the real ones'. It is in eval mode
and shared between tests: not to be changed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from diffusers import Lumina2Transformer2DModel

from tinies.encoders import randomised

CONTEXT = 64
"""Width of the text states: Gemma's."""


@cache
def transformer() -> Any:
    """The transformer: four heads of queries, two of keys and values."""
    return randomised(
        9,
        lambda: Lumina2Transformer2DModel(
            hidden_size=96,
            num_layers=3,
            num_refiner_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=32,
            axes_dim_rope=(8, 8, 8),
            cap_feat_dim=CONTEXT,
        ),
    )
