"""The names of FLUX.1's transformer: the table to diffusers, the layers that adapters go on."""

from __future__ import annotations

from collections.abc import Mapping

from sfumato.formats.names import SWAP_HALVES, KeyMap, Rule, rule
from sfumato.models.detection import Shapes

_ATTENTION, _MLP = ("double_blocks.*_attn.*",), ("double_blocks.*_mlp.*",)
TARGETS: Mapping[str, tuple[str, ...]] = {
    "linear": ("double_blocks.*", "single_blocks.*"),
    "double_blocks": ("double_blocks.*",),
    "single_blocks": ("single_blocks.*",),
    # A block of one stream has both in one layer, linear1, and both come out of linear2.
    "attention": (*_ATTENTION, "single_blocks.*.linear?"),
    "mlp": (*_MLP, "single_blocks.*.linear?"),
    "modulation": ("double_blocks.*_mod.*", "single_blocks.*.modulation.*"),
    "inputs": ("img_in*", "time_in*", "vector_in*", "guidance_in*", "txt_in*"),
    "output": ("final_layer.*",),
    # sd-scripts' classes, which LyCORIS' presets name.
    "DoubleStreamBlock": ("double_blocks.*",),
    "SingleStreamBlock": ("single_blocks.*",),
    "SelfAttention": _ATTENTION,
}
"""Set of layers -> path patterns of the layers. "linear" has adapters by default: every linear layer of every block."""

DOUBLE, SINGLE = "double_blocks.{i}", "single_blocks.{i}"
FOREIGN_DOUBLE, FOREIGN_SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"


_HINT = ("conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out")
CONTROL = (
    rule("controlnet_blocks.{i}"),
    rule("controlnet_single_blocks.{i}"),
    rule("pos_embed_input", "controlnet_x_embedder"),
    *(rule(f"input_hint_block.{2 * i}", f"input_hint_block.{name}") for i, name in enumerate(_HINT)),
)
"""What a control net has besides the layers of the transformer."""


def flux_keys(shapes: Shapes) -> KeyMap:
    """native: Black Forest Labs. foreign: diffusers' FluxTransformer2DModel. For a net with tensors of these shapes, of
    either side."""
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    return KeyMap(
        *trunk_rules(shapes),
        *(rule(f"{n}.in_layer", f"time_text_embed.{f}.linear_1") for n, f in embedders.items()),
        *(rule(f"{n}.out_layer", f"time_text_embed.{f}.linear_2") for n, f in embedders.items()),
        rule(f"{DOUBLE}.img_mod.lin", f"{FOREIGN_DOUBLE}.norm1.linear"),
        rule(f"{DOUBLE}.txt_mod.lin", f"{FOREIGN_DOUBLE}.norm1_context.linear"),
        rule(f"{SINGLE}.modulation.lin", f"{FOREIGN_SINGLE}.norm.linear"),
        rule("final_layer.adaLN_modulation.1", "norm_out.linear", change=SWAP_HALVES),
    )


def trunk_rules(shapes: Shapes) -> list[Rule]:
    """The rules for what FLUX and Chroma share."""
    qkv = (f"{FOREIGN_SINGLE}.attn.to_q", f"{FOREIGN_SINGLE}.attn.to_k", f"{FOREIGN_SINGLE}.attn.to_v")
    return [
        rule("img_in", "x_embedder"),
        rule("txt_in", "context_embedder"),
        *_stream("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm", "ff"),
        *_stream("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added", "ff_context"),
        rule(f"{SINGLE}.linear1", *qkv, f"{FOREIGN_SINGLE}.proj_mlp", rows=_rows(shapes)),
        rule(f"{SINGLE}.linear2", f"{FOREIGN_SINGLE}.proj_out"),
        rule(f"{SINGLE}.norm.query_norm.scale", f"{FOREIGN_SINGLE}.attn.norm_q.weight"),
        rule(f"{SINGLE}.norm.key_norm.scale", f"{FOREIGN_SINGLE}.attn.norm_k.weight"),
        rule("final_layer.linear", "proj_out"),
    ]


def xlabs_keys(shapes: Shapes) -> KeyMap:
    """native: Black Forest Labs. foreign: XLabs' adapters, whose processors of attention hold the factors of both
    streams; of a single block they adapt q, k and v together. As `formats/spellings.py` leaves them: without
    "processor" and, in single blocks, "_lora"."""
    rows = _rows(shapes)
    single = rows and (sum(rows[:3]), rows[3])
    return KeyMap(
        *(
            rule(f"{DOUBLE}.{side}_attn.{name}", f"{DOUBLE}.{name}_lora{i}")
            for i, side in ((1, "img"), (2, "txt"))
            for name in ("qkv", "proj")
        ),
        rule(f"{SINGLE}.linear1", f"{SINGLE}.qkv", f"{SINGLE}.mlp", rows=single),
        rule(f"{SINGLE}.linear2", f"{SINGLE}.proj"),
    )


def _stream(side: str, qkv: tuple[str, str, str], out: str, norm: str, ff: str) -> list[Rule]:
    """One stream of the double blocks."""
    native, foreign = f"{DOUBLE}.{side}", FOREIGN_DOUBLE
    return [
        rule(f"{native}_attn.qkv", *(f"{foreign}.attn.{name}" for name in qkv)),
        rule(f"{native}_attn.norm.query_norm.scale", f"{foreign}.attn.{norm}_q.weight"),
        rule(f"{native}_attn.norm.key_norm.scale", f"{foreign}.attn.{norm}_k.weight"),
        rule(f"{native}_attn.proj", f"{foreign}.attn.{out}"),
        rule(f"{native}_mlp.0", f"{foreign}.{ff}.net.0.proj"),
        rule(f"{native}_mlp.2", f"{foreign}.{ff}.net.2"),
    ]


def _rows(shapes: Shapes) -> tuple[int, int, int, int] | None:
    """Rows of q, k, v and the two-layer net in `linear1`; None for a model without single blocks, which has no such
    layer."""
    if "single_blocks.0.linear1.weight" in shapes:
        rows, width = shapes["single_blocks.0.linear1.weight"]
        return width, width, width, rows - 3 * width
    if "single_transformer_blocks.0.proj_mlp.weight" in shapes:
        rows, width = shapes["single_transformer_blocks.0.proj_mlp.weight"]
        return width, width, width, rows
    return None


def control_keys(shapes: Shapes) -> KeyMap:
    """native: XLabs' and sd-scripts' control nets. foreign: diffusers' FluxControlNetModel. For a net with tensors of
    these shapes, of either side."""
    return KeyMap(*flux_keys(shapes).rules, *CONTROL)
