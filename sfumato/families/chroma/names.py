"""The names of Chroma's transformer: the table to diffusers, the layers that adapters go on."""

from __future__ import annotations

from sfumato.families.flux.names import TARGETS, trunk_rules
from sfumato.formats.names import KeyMap, rule
from sfumato.models.detection import Shapes

__all__ = ["TARGETS", "chroma_keys"]

_GUIDANCE = "distilled_guidance_layer"


def chroma_keys(shapes: Shapes) -> KeyMap:
    """native: Chroma's own. foreign: diffusers' ChromaTransformer2DModel. For a net with tensors of these shapes, of
    either side."""
    return KeyMap(
        *trunk_rules(shapes),
        rule(f"{_GUIDANCE}.in_proj"),
        rule(f"{_GUIDANCE}.layers.{{i}}.in_layer", f"{_GUIDANCE}.layers.{{i}}.linear_1"),
        rule(f"{_GUIDANCE}.layers.{{i}}.out_layer", f"{_GUIDANCE}.layers.{{i}}.linear_2"),
        rule(f"{_GUIDANCE}.norms.{{i}}.scale", f"{_GUIDANCE}.norms.{{i}}.weight"),
        rule(f"{_GUIDANCE}.out_proj"),
    )
