"""The names of Lumina Image 2.0's transformer: the table to diffusers, the layers that adapters go on."""

from __future__ import annotations

from collections.abc import Mapping

from sfumato.families.lumina2.net import STACKS
from sfumato.formats.names import KeyMap, Rule, rule
from sfumato.models.detection import Shapes

UNUSED = "norm_final.weight"
"""A norm that stands in the files, and that none applies who run the model."""

_BLOCKS = tuple(f"{stack}.*" for stack in STACKS)
TARGETS: Mapping[str, tuple[str, ...]] = {
    "linear": (*_BLOCKS, "final_layer.*"),
    "layers": ("layers.*",),
    "refiners": ("context_refiner.*", "noise_refiner.*"),
    "attention": tuple(f"{blocks}.attention.*" for blocks in _BLOCKS),
    "mlp": tuple(f"{blocks}.feed_forward.*" for blocks in _BLOCKS),
    "modulation": tuple(f"{blocks}.adaLN_modulation.*" for blocks in _BLOCKS),
    "embedders": ("x_embedder*", "t_embedder*", "cap_embedder*"),
    "output": ("final_layer.*",),
    # sd-scripts' classes, which LyCORIS' presets name.
    "JointTransformerBlock": _BLOCKS,
    "FinalLayer": ("final_layer.*",),
}
"""Set of layers -> path patterns of the layers. "linear" has adapters by default, as in sd-scripts."""

_ENDS = {
    "x_embedder": "x_embedder",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder": "time_caption_embed.caption_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
_BLOCK = {
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention_norm2": "norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}


def transformer_keys(shapes: Shapes) -> KeyMap:
    """native: Alpha-VLLM's. foreign: diffusers' Lumina2Transformer2DModel. For a net with tensors of these shapes, of
    either side."""
    ends = [rule(native, foreign) for native, foreign in _ENDS.items()]
    return KeyMap(*ends, *(each for stack in STACKS for each in _block(f"{stack}.{{i}}", _rows(shapes))))


def _block(name: str, rows: tuple[int, int, int] | None) -> list[Rule]:
    """The rules for the blocks of this name, whose queries, keys and values have so many rows."""
    # diffusers has norm and modulation of a modulated block in one layer.
    modulated = not name.startswith("context_refiner")
    return [
        *(rule(f"{name}.{native}", f"{name}.{foreign}") for native, foreign in _BLOCK.items()),
        rule(f"{name}.attention.qkv", *(f"{name}.attn.to_{part}" for part in "qkv"), rows=rows),
        rule(f"{name}.attention_norm1", f"{name}.norm1{'.norm' * modulated}"),
        *([rule(f"{name}.adaLN_modulation.1", f"{name}.norm1.linear")] if modulated else []),
    ]


def _rows(shapes: Shapes) -> tuple[int, int, int] | None:
    """Rows of q, k and v in `qkv`, of which k and v have fewer; None: the net has no block to read them off."""
    if "layers.0.attention.qkv.weight" in shapes:
        both, q = shapes["layers.0.attention.qkv.weight"][0], shapes["layers.0.attention.out.weight"][1]
        return q, (both - q) // 2, (both - q) // 2
    if "layers.0.attn.to_q.weight" in shapes:
        q, k = (shapes[f"layers.0.attn.to_{part}.weight"][0] for part in "qk")
        return q, k, k
    return None
