"""The names of Anima: the table to diffusers, adapters' names and places."""

from __future__ import annotations

from collections.abc import Mapping

from sfumato.families.anima.facts import BESIDE, QWEN3
from sfumato.formats.dialect import Dialect, usual
from sfumato.formats.names import KeyMap, rule

_ATTENTION = ("blocks.*.self_attn.*", "blocks.*.cross_attn.*")
_MLP = ("blocks.*.mlp.*",)
TARGETS: Mapping[str, tuple[str, ...]] = {
    "linear": (*_ATTENTION, *_MLP),
    "attention": _ATTENTION,
    "self_attention": _ATTENTION[:1],
    "cross_attention": _ATTENTION[1:],
    "mlp": _MLP,
    "modulation": ("blocks.*.adaln_modulation_*",),
    "embedders": ("x_embedder.*", "t_embedder.*"),
    "output": ("final_layer.*",),
    "llm_adapter": ("llm_adapter.blocks.*",),
    # sd-scripts' classes, which LyCORIS' presets name.
    "Block": ("blocks.*",),
    "PatchEmbed": ("x_embedder.*",),
    "TimestepEmbedding": ("t_embedder.*",),
    "FinalLayer": ("final_layer.*",),
    "LLMAdapterTransformerBlock": ("llm_adapter.blocks.*",),
}
"""Set of layers -> path patterns of the layers. "linear" has adapters by default; sd-scripts leaves modulations and
ends out as well."""

_ENDS = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1": "time_embed.t_embedder",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    **{
        f"{ours}.{n}": f"{theirs}.{f}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for n, f in {
            **{f"{part}_proj": f"to_{part}" for part in "qkv"},
            "output_proj": "to_out.0",
            "q_norm": "norm_q",
            "k_norm": "norm_k",
        }.items()
    },
    **{
        f"adaln_modulation_{part}.{i}": f"norm{n}.linear_{i}"
        for n, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for i in (1, 2)
    },
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
}


def anima_keys(prefix: str = "") -> KeyMap:
    """native: Anima's. foreign: diffusers' CosmosTransformer3DModel, its names below `prefix`, and AnimaTextConditioner
    below its component's name."""
    ends = [rule(native, prefix + foreign) for native, foreign in _ENDS.items()]
    inner = [rule(f"blocks.{{i}}.{n}", f"{prefix}transformer_blocks.{{i}}.{f}") for n, f in _BLOCK.items()]
    return KeyMap(*ends, *inner, rule("llm_adapter", *BESIDE))


def dialects() -> Mapping[str, Dialect]:
    """Adapter names: kohya's and ComfyUI's are built on those of the file, PEFT's on diffusers', whose loader knows no
    text encoder of this model."""
    kohya = {"denoiser": "lora_unet_", "qwen3": "lora_te_"}
    comfy = {"denoiser": "diffusion_model.", "qwen3": f"{QWEN3}model."}
    return usual(kohya, comfy, {"denoiser": ""}, {"denoiser": anima_keys("transformer.")})
