"""What diffusers' modular pipeline of Anima reads from a folder besides weights."""

from __future__ import annotations

from typing import Any, cast

from sfumato.families.anima.facts import SHIFT
from sfumato.families.anima.net import PATCH, ROWS, STRETCH
from sfumato.models.base import Models, NewFolder
from sfumato.models.encoders.llm import DecoderLM
from sfumato.models.layers import Shapes, numbered
from sfumato.models.new_folder import llm_config, vae_config

CLASSES = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "t5_tokenizer": ("transformers", "T5Tokenizer"),
    "text_conditioner": ("diffusers", "AnimaTextConditioner"),
    "text_encoder": ("transformers", "Qwen3Model"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "transformer": ("diffusers", "CosmosTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLQwenImage"),
}
"""Folder -> (library, class)."""
MAX_SIZE = (128, 240, 240)
"""Frames and latents that diffusers makes positions for."""


def new_folder(models: Models) -> NewFolder | None:
    """For `Family.new_folder`. None: the model came as a folder, which is copied. Errors: `UserError` where there is no
    VAE."""
    if models.source.layout == "diffusers":
        return None
    shapes = {name: tuple(t.shape) for name, t in models.denoiser.state_dict().items()}
    return NewFolder(
        index=_index(),
        index_name="modular_model_index.json",
        configs={
            "denoiser": _transformer(shapes),
            "text_conditioner": _conditioner(shapes),
            "qwen3": llm_config(cast(DecoderLM, models.encoders["qwen3"])),
            "vae": vae_config(models.vae),
        },
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": SHIFT},
    )


def _index() -> dict[str, Any]:
    """modular_model_index.json; diffusers takes what is in the folder itself, wherever that comes to stand."""
    parts = {
        name: [*which, {"pretrained_model_name_or_path": None, "subfolder": name, "type_hint": list(which)}]
        for name, which in CLASSES.items()
    }
    return {"_class_name": "AnimaModularPipeline", "_blocks_class_name": "AnimaAutoBlocks", **parts}


def _transformer(shapes: Shapes) -> dict[str, Any]:
    (width, inputs), head = shapes["x_embedder.proj.1.weight"], shapes["blocks.0.self_attn.q_norm.weight"][0]
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": inputs // PATCH**2 - 1,
        "out_channels": shapes["final_layer.linear.weight"][0] // PATCH**2,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": len(numbered(shapes, "blocks")),
        "mlp_ratio": shapes["blocks.0.mlp.layer1.weight"][0] / width,
        "text_embed_dim": shapes["blocks.0.cross_attn.k_proj.weight"][1],
        "adaln_lora_dim": shapes["blocks.0.adaln_modulation_mlp.1.weight"][0],
        "max_size": MAX_SIZE,
        "patch_size": (1, PATCH, PATCH),
        "rope_scale": (1.0, STRETCH, STRETCH),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
    }


def _conditioner(shapes: Shapes) -> dict[str, Any]:
    (rows, target), block = shapes["llm_adapter.embed.weight"], "llm_adapter.blocks.0"
    width, head = shapes[f"{block}.self_attn.q_proj.weight"][1], shapes[f"{block}.self_attn.q_norm.weight"][0]
    return {
        "_class_name": "AnimaTextConditioner",
        "source_dim": shapes[f"{block}.cross_attn.k_proj.weight"][1],
        "target_dim": target,
        "model_dim": width,
        "num_layers": len(numbered(shapes, "llm_adapter.blocks")),
        "num_attention_heads": width // head,
        "mlp_ratio": shapes[f"{block}.mlp.0.weight"][0] / width,
        "target_vocab_size": rows,
        "min_sequence_length": ROWS,
    }
