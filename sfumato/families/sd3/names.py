"""The names of Stable Diffusion 3's files: prefixes of the single file, the table to diffusers, adapters' names and
places."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sfumato.formats.dialect import Dialect, usual
from sfumato.formats.names import SWAP_HALVES, KeyMap, rule

CLIP_L = "text_encoders.clip_l.transformer."
CLIP_G = "text_encoders.clip_g.transformer."
T5 = "text_encoders.t5xxl.transformer."
VAE = "first_stage_model."

TARGETS: Mapping[str, tuple[str, ...]] = {
    "linear": ("joint_blocks.*",),
    "attention": ("joint_blocks.*.attn.*", "joint_blocks.*.attn2.*"),
    "mlp": ("joint_blocks.*.mlp.*",),
    "modulation": ("joint_blocks.*.adaLN_modulation.*",),
    "image": ("joint_blocks.*.x_block.*",),
    "context": ("joint_blocks.*.context_block.*",),
    "embedders": ("context_embedder*", "t_embedder*", "x_embedder*", "y_embedder*"),
    "output": ("final_layer.*",),
    # sd-scripts' class, which LyCORIS' presets name.
    "SingleDiTBlock": ("joint_blocks.*",),
}
"""Set of layers -> path patterns of the layers. "linear" has adapters by default; sd-scripts leaves embedders and the
final layer out as well."""

_ENDS = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_BLOCK: dict[str, tuple[str, ...]] = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}


_RULES = (
    *(rule(native, foreign) for native, foreign in _ENDS.items()),
    *(
        rule(f"joint_blocks.{{i}}.{n}", *(f"transformer_blocks.{{i}}.{f}" for f in foreign))
        for n, foreign in _BLOCK.items()
    ),
)


def transformer_keys(names: Collection[str]) -> KeyMap:
    """native: Stability's. foreign: diffusers' SD3Transformer2DModel. For a net with tensors of these names, of either
    side."""
    last = max(
        (int(m[1]) for name in names if (m := re.match(r"(?:joint|transformer)_blocks\.(\d+)\.", name))), default=0
    )
    block, theirs = f"joint_blocks.{last}", f"transformer_blocks.{last}"
    # Where only shift and scale are left, diffusers holds them the other way round.
    swapped = [
        rule(f"{block}.context_block.adaLN_modulation.1", f"{theirs}.norm1_context.linear", change=SWAP_HALVES),
        rule("final_layer.adaLN_modulation.1", "norm_out.linear", change=SWAP_HALVES),
    ]
    # The rule with a number stands before the one for any number, which would claim its name as well.
    return KeyMap(*swapped, *_RULES)


def control_keys() -> KeyMap:
    """native: the transformer's for what both have. foreign: diffusers' SD3ControlNetModel, in whose last block the
    text goes on."""
    return KeyMap(*_RULES, rule("controlnet_blocks.{i}"), rule("pos_embed_input.proj"))


def dialects(names: Collection[str]) -> Mapping[str, Dialect]:
    """Adapter names for a transformer with tensors of these names: kohya's and ComfyUI's are built on the single
    file's, PEFT's on diffusers', which loads no adapter for T5."""
    kohya = {"denoiser": "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"}
    comfy = {"denoiser": "diffusion_model.", "clip_l": CLIP_L, "clip_g": CLIP_G, "t5xxl": T5}
    peft = {"denoiser": "transformer.", "clip_l": "text_encoder.", "clip_g": "text_encoder_2."}
    keys = {"denoiser": transformer_keys(names)}
    return usual(kohya, comfy, peft, keys)
