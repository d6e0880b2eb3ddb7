"""The names of HunyuanImage-2.1's transformer: the tables to diffusers' and to ComfyUI's, the layers that adapters go
on."""

from __future__ import annotations

from collections.abc import Mapping

from sfumato.formats.names import SWAP_HALVES, KeyMap, Rule, rule
from sfumato.models.detection import Shapes

_ATTENTION, _MLP = ("double_blocks.*_attn_*",), ("double_blocks.*_mlp.*",)
_BLOCKS = ("double_blocks.*", "single_blocks.*")
TARGETS: Mapping[str, tuple[str, ...]] = {
    "linear": _BLOCKS,
    "double_blocks": ("double_blocks.*",),
    "single_blocks": ("single_blocks.*",),
    # A block of one stream has both in one layer, linear1, and both come out of linear2.
    "attention": (*_ATTENTION, "single_blocks.*.linear?"),
    "mlp": (*_MLP, "single_blocks.*.linear?"),
    "modulation": ("double_blocks.*_mod.*", "single_blocks.*.modulation.*"),
    "inputs": ("img_in*", "time_in*", "time_r_in*", "guidance_in*", "txt_in*", "byt5_in*"),
    "output": ("final_layer.*",),
    # sd-scripts' classes, which LyCORIS' presets name.
    "MMDoubleStreamBlock": ("double_blocks.*",),
    "MMSingleStreamBlock": ("single_blocks.*",),
}
"""Set of layers -> path patterns of the layers. "linear" has adapters by default: every linear layer of every block."""

DOUBLE, SINGLE = "double_blocks.{i}", "single_blocks.{i}"
REFINER = "txt_in.individual_token_refiner.blocks.{i}"
_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_REFINER = "context_embedder.token_refiner.refiner_blocks.{i}"
_QKV = ("to_q", "to_k", "to_v")
TIMES = {
    "time_in": "time_guidance_embed.timestep_embedder",
    "time_r_in": "time_guidance_embed.timestep_embedder_r",
    "guidance_in": "time_guidance_embed.guidance_embedder",
    "txt_in.t_embedder": "context_embedder.time_text_embed.timestep_embedder",
}
"""What embeds times -> diffusers' name of it."""


def transformer_keys(shapes: Shapes) -> KeyMap:
    """native: Tencent's. foreign: diffusers' HunyuanImageTransformer2DModel. For a net with tensors of these shapes, of
    either side."""
    text = "context_embedder.time_text_embed.text_embedder"
    return KeyMap(
        rule("img_in.proj", "x_embedder.proj"),
        *(rule(f"{n}.mlp.{i}", f"{f}.linear_{j}") for n, f in TIMES.items() for i, j in ((0, 1), (2, 2))),
        *(rule(f"txt_in.c_embedder.linear_{i}", f"{text}.linear_{i}") for i in (1, 2)),
        rule("txt_in.input_embedder", "context_embedder.proj_in"),
        rule("byt5_in.layernorm", "context_embedder_2.norm"),
        *(rule(f"byt5_in.fc{i}", f"context_embedder_2.linear_{i}") for i in (1, 2, 3)),
        *_refiner_rules(),
        *_stream("img", _QKV, "to_out.0", "norm", "ff", "norm1"),
        *_stream(
            "txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added", "ff_context", "norm1_context"
        ),
        rule(f"{SINGLE}.linear1", *(f"{_SINGLE}.attn.{n}" for n in _QKV), f"{_SINGLE}.proj_mlp", rows=_rows(shapes)),
        rule(f"{SINGLE}.linear2", f"{_SINGLE}.proj_out"),
        rule(f"{SINGLE}.q_norm", f"{_SINGLE}.attn.norm_q"),
        rule(f"{SINGLE}.k_norm", f"{_SINGLE}.attn.norm_k"),
        rule(f"{SINGLE}.modulation.linear", f"{_SINGLE}.norm.linear"),
        rule("final_layer.linear", "proj_out"),
        # Shift and scale, which diffusers holds the other way round.
        rule("final_layer.adaLN_modulation.1", "norm_out.linear", change=SWAP_HALVES),
    )


def _refiner_rules() -> list[Rule]:
    return [
        rule(f"{REFINER}.norm1", f"{_REFINER}.norm1"),
        rule(f"{REFINER}.norm2", f"{_REFINER}.norm2"),
        rule(f"{REFINER}.self_attn_qkv", *(f"{_REFINER}.attn.{n}" for n in _QKV)),
        rule(f"{REFINER}.self_attn_proj", f"{_REFINER}.attn.to_out.0"),
        rule(f"{REFINER}.mlp.fc1", f"{_REFINER}.ff.net.0.proj"),
        rule(f"{REFINER}.mlp.fc2", f"{_REFINER}.ff.net.2"),
        rule(f"{REFINER}.adaLN_modulation.1", f"{_REFINER}.norm_out.linear"),
    ]


def _stream(side: str, qkv: tuple[str, ...], out: str, norm: str, ff: str, mod: str) -> list[Rule]:
    """One stream of the double blocks."""
    native = f"{DOUBLE}.{side}"
    return [
        rule(f"{native}_mod.linear", f"{_DOUBLE}.{mod}.linear"),
        rule(f"{native}_attn_qkv", *(f"{_DOUBLE}.attn.{name}" for name in qkv)),
        rule(f"{native}_attn_q_norm", f"{_DOUBLE}.attn.{norm}_q"),
        rule(f"{native}_attn_k_norm", f"{_DOUBLE}.attn.{norm}_k"),
        rule(f"{native}_attn_proj", f"{_DOUBLE}.attn.{out}"),
        rule(f"{native}_mlp.fc1", f"{_DOUBLE}.{ff}.net.0.proj"),
        rule(f"{native}_mlp.fc2", f"{_DOUBLE}.{ff}.net.2"),
    ]


def _rows(shapes: Shapes) -> tuple[int, int, int, int] | None:
    """Rows of q, k, v and the two-layer net in `linear1`; None for a model without single blocks."""
    native, foreign = "single_blocks.0.linear1.weight", "single_transformer_blocks.0.proj_mlp.weight"
    if native in shapes:
        rows, width = shapes[native]
        return width, width, width, rows - 3 * width
    if foreign in shapes:
        rows, width = shapes[foreign]
        return width, width, width, rows
    return None


def _comfy_rules() -> list[Rule]:
    """What ComfyUI calls otherwise, stands before the names that it leaves as they are."""
    out = [rule(f"{n}.mlp.{i}", f"{n}.{part}") for n in TIMES for i, part in ((0, "in_layer"), (2, "out_layer"))]
    out += [
        rule(f"txt_in.c_embedder.linear_{i}", f"txt_in.c_embedder.{part}_layer") for i, part in ((1, "in"), (2, "out"))
    ]
    attentions = [f"{DOUBLE}.img_attn", f"{DOUBLE}.txt_attn", f"{REFINER}.self_attn"]
    out += [rule(f"{n}_{part}", f"{n}.{part}") for n in attentions for part in ("qkv", "proj")]
    mlps = [f"{DOUBLE}.img_mlp", f"{DOUBLE}.txt_mlp", f"{REFINER}.mlp"]
    out += [rule(f"{n}.fc{i}", f"{n}.{j}") for n in mlps for i, j in ((1, 0), (2, 2))]
    norms = [(f"{n}_", f"{n}.") for n in attentions[:2]] + [(f"{SINGLE}.", f"{SINGLE}.")]
    out += [
        rule(f"{n}{a}_norm.weight", f"{f}norm.{b}_norm.scale")
        for n, f in norms
        for a, b in (("q", "query"), ("k", "key"))
    ]
    mods = [f"{DOUBLE}.img_mod", f"{DOUBLE}.txt_mod", f"{SINGLE}.modulation"]
    return out + [rule(f"{n}.linear", f"{n}.lin") for n in mods]


_SAME = ("img_in", "txt_in.input_embedder", "byt5_in", "final_layer", f"{SINGLE}.linear1", f"{SINGLE}.linear2")
_SAME_IN_REFINER = ("norm1", "norm2", "adaLN_modulation")
COMFY = KeyMap(*_comfy_rules(), *(rule(n) for n in _SAME), *(rule(f"{REFINER}.{n}") for n in _SAME_IN_REFINER))
"""native: Tencent's. foreign: ComfyUI's, which are FLUX's where there are such."""
