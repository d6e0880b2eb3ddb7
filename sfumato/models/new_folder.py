"""What a diffusers folder holds besides weights, for models that came as single files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sfumato.errors import UserError
from sfumato.models.base import Models, NewFolder
from sfumato.models.components import ComponentWeights
from sfumato.models.encoders.llm import QWEN25VL, DecoderLM
from sfumato.models.encoders.t5 import T5Encoder
from sfumato.models.layers import count_layers
from sfumato.models.meta_init import shapes


def index(pipeline: str, present: Mapping[str, tuple[str, str]], absent: Collection[str]) -> dict[str, Any]:
    """model_index.json; `present`: folder -> (library, class)."""
    return {
        "_class_name": pipeline,
        **{name: list(what) for name, what in present.items()},
        **{name: [None, None] for name in absent},
    }


def text_config(encoder: Any, kind: str = "CLIPTextModel") -> dict[str, Any]:
    """config.json of a `ClipText`; `kind`: transformers' class."""
    return {**encoder.config.to_diff_dict(), "architectures": [kind], "model_type": "clip_text_model"}


def t5_config(encoder: T5Encoder) -> dict[str, Any]:
    """config.json of a T5 encoder; its embedding stands in the file once, so transformers has to tie the two."""
    return {
        **encoder.config.to_diff_dict(),
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "tie_word_embeddings": True,
    }


def llm_config(encoder: DecoderLM) -> dict[str, Any]:
    """config.json of a language model."""
    return {
        **encoder.config.to_diff_dict(),
        "architectures": [f"{encoder.recipe.classes}Model"],
        "model_type": encoder.recipe.module,
        "rope_parameters": {"rope_type": "default", "rope_theta": encoder.recipe.theta},
    }


def qwen25vl_config(weights: ComponentWeights, encoder: DecoderLM) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL, sized by its two halves. Errors: `UserError` where the file holds one alone."""
    text, seeing = llm_config(encoder), shapes(weights.carried())
    if (patches := seeing.get("visual.patch_embed.proj.weight")) is None:
        raise UserError(
            f"{weights.where} holds the language half of Qwen2.5-VL alone, and a diffusers folder has both; give the "
            f"whole with {weights.component.flag}, or choose another save_model_as"
        )
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    mrope = {**text["rope_parameters"], "mrope_section": [16, 24, 24]}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "text_config": {
            **{name: text[name] for name in (*kept, "num_key_value_heads", "rms_norm_eps")},
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": mrope,
        },
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "depth": count_layers(seeing, r"visual\.blocks\.(\d+)\."),
            "hidden_size": patches[0],
            "num_heads": max(patches[0] // 80, 1),
            "intermediate_size": seeing["visual.blocks.0.mlp.up_proj.weight"][0],
            "out_hidden_size": text["hidden_size"],
        },
    }


def encoder_config(weights: ComponentWeights, encoder: Any, clip: str) -> tuple[dict[str, Any], str]:
    """config.json of a text encoder, and transformers' class of its tokenizer; `clip`: the class of a CLIP."""
    if isinstance(encoder, DecoderLM):
        config = qwen25vl_config(weights, encoder) if encoder.recipe is QWEN25VL else llm_config(encoder)
        return config, encoder.recipe.tokenizer
    if isinstance(encoder, T5Encoder):
        return t5_config(encoder), "ByT5Tokenizer" if weights.component.name == "byt5" else "T5Tokenizer"
    return text_config(encoder, clip), "CLIPTokenizer"


def vae_config(vae: Any) -> dict[str, Any]:
    """config.json of a VAE."""
    return {"_class_name": type(vae).__name__, **{k: v for k, v in vae.config.items() if not k.startswith("_")}}


def flow_folder(
    models: Models,
    pipeline: str,
    transformer: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    clip: str = "CLIPTextModel",
) -> NewFolder | None:
    """That of a rectified flow with a transformer. None: the model came as a folder, which is copied.

    `pipeline`: diffusers' class; `transformer`: its config, with its class; `scheduler`: the settings of the Euler
    sampler; `clip`: the class of its CLIPs. Errors: `UserError` where there is no VAE.
    """
    if models.source.layout == "diffusers":
        return None
    folders = {component.name: component.folder for component in models.family.components}
    present = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "transformer": ("diffusers", str(transformer["_class_name"])),
        "vae": ("diffusers", type(models.vae).__name__),
    }
    absent = {"feature_extractor", "image_encoder"}
    configs = {"denoiser": transformer, "vae": vae_config(models.vae)}
    for name, spec in models.family.tokenizer_specs.items():
        if name not in models.encoders:
            absent |= {folders[name], spec.folder}
            continue
        configs[name], tokenizer = encoder_config(models.source.components[name], models.encoders[name], clip)
        present[folders[name]] = ("transformers", configs[name]["architectures"][0])
        present[spec.folder] = ("transformers", tokenizer)
    return NewFolder(
        index=index(pipeline, present, absent),
        configs=configs,
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **scheduler},
    )
