"""Names of adapters as other programs spell them, taken from their sources and files; at full size, without values."""

from __future__ import annotations

from functools import cache

import pytest

from sfumato import families
from sfumato.formats.dialect import ModulePath
from sfumato.formats.spellings import Spellings
from sfumato.tools.adapter_file import usual_outlines

DENOISER, T5 = "denoiser", "t5xxl"
Q = "double_blocks.3.img_attn.qkv"
SD = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
SDXL = "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0"
CLIP = "text_model.encoder.layers.7.self_attn.q_proj"
SELF = "encoder.block.2.layer.0.SelfAttention.q"
THEIRS: dict[str, tuple[str, str, tuple[str, str, int]]] = {
    "OneTrainer, old": ("flux", "lora_transformer_transformer_blocks_3_attn_to_k.lora_down.weight", (DENOISER, Q, 1)),
    "OneTrainer, old U-Net": (
        "sdxl",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha",
        (DENOISER, SDXL, 0),
    ),
    "OneTrainer, T5 as the second encoder": (
        "flux",
        f"lora_te2_{SELF.replace('.', '_')}.lora_up.weight",
        (T5, SELF, 0),
    ),
    "OneTrainer, OMI": ("flux", "transformer.double_blocks.3.img_attn.qkv.2.lora_up.weight", (DENOISER, Q, 2)),
    "OMI, DoRA": ("flux", "transformer.single_blocks.1.linear1.3.dora_scale", (DENOISER, "single_blocks.1.linear1", 3)),
    "OMI, U-Net": ("sdxl", f"unet.{SDXL}.lora_down.weight", (DENOISER, SDXL, 0)),
    "OMI, CLIP": ("sdxl", f"clip_g.{CLIP}.lora_down.weight", ("clip_g", CLIP, 0)),
    "OMI, T5": ("flux", f"t5.{SELF}.lora_down.weight", (T5, SELF, 0)),
    "OneTrainer for ComfyUI": ("flux", f"diffusion_model.{Q}.lora_A.weight", (DENOISER, Q, 0)),
    "SimpleTuner, LyCORIS": ("flux", "lycoris_transformer_blocks_3_attn_to_v.lokr_w2_b", (DENOISER, Q, 2)),
    "LyCORIS' wrapper of the checkpoint's net": ("flux", f"lycoris_{Q.replace('.', '_')}.hada_w1_a", (DENOISER, Q, 0)),
    "ai-toolkit": ("flux", "transformer.transformer_blocks.3.attn.to_q.lora_A.weight", (DENOISER, Q, 0)),
    "diffusion-pipe": ("chroma", f"diffusion_model.{Q}.lora_B.weight", (DENOISER, Q, 0)),
    "musubi-tuner": ("flux", f"lora_unet_{Q.replace('.', '_')}.lora_up.weight", (DENOISER, Q, 0)),
    "kohya's T5 of a model without CLIP": ("chroma", f"lora_te3_{SELF.replace('.', '_')}.alpha", (T5, SELF, 0)),
    "PEFT": ("flux", "base_model.model.transformer_blocks.3.attn.to_q.lora_A.default.weight", (DENOISER, Q, 0)),
    "PEFT, saved": ("flux", "base_model.model.double_blocks.3.img_attn.qkv.hada_w2_b", (DENOISER, Q, 0)),
    "PEFT, DoRA": ("flux", f"base_model.model.{Q}.lora_magnitude_vector.default", (DENOISER, Q, 0)),
    "bare names of the checkpoint": ("flux", f"{Q}.lora_B.weight", (DENOISER, Q, 0)),
    "bare names of diffusers": ("flux", "transformer_blocks.3.attn.to_k.lora_B.weight", (DENOISER, Q, 1)),
    "XLabs": ("flux", "double_blocks.3.processor.qkv_lora1.down.weight", (DENOISER, Q, 0)),
    "XLabs, text": (
        "flux",
        "double_blocks.3.processor.proj_lora2.up.weight",
        (DENOISER, "double_blocks.3.txt_attn.proj", 0),
    ),
    "XLabs, single": (
        "flux",
        "single_blocks.4.processor.qkv_lora.up.weight",
        (DENOISER, "single_blocks.4.linear1", 0),
    ),
    "diffusers 0.18": (
        "sd",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        (DENOISER, SD, 0),
    ),
    "diffusers 0.16": (
        "sd",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
        (DENOISER, SD.replace("to_q", "to_out.0"), 0),
    ),
    "diffusers 0.20, text": ("sd", f"text_encoder.{CLIP}.lora_linear_layer.up.weight", ("clip_l", CLIP, 0)),
    "diffusers 0.22": ("sd", f"text_encoder.{CLIP}.lora.down.weight", ("clip_l", CLIP, 0)),
    "transformers 5": (
        "sdxl",
        f"text_encoder_2.{CLIP.removeprefix('text_model.')}.lora_A.weight",
        ("clip_g", CLIP, 0),
    ),
    "kohya's OFT": ("sdxl", f"oft_unet_{SDXL.replace('.', '_')}.oft_blocks", (DENOISER, SDXL, 0)),
}
LEAVES = {"lora_up.weight", "lora_down.weight", "lora_A.weight", "lora_B.weight", "alpha", "lora_magnitude_vector"}


@cache
def spellings(family: str) -> Spellings:
    return usual_outlines(family)[0].spellings


@pytest.mark.parametrize("program", THEIRS)
def test_names_of_other_programs(program: str) -> None:
    family, key, (component, path, piece) = THEIRS[program]
    found = spellings(family).find(key)
    assert found is not None
    layer, leaf = found
    assert (layer.path, layer.piece) == ((component, path), piece)
    assert leaf in LEAVES or leaf.startswith(("hada_", "lokr_", "oft_", "dora_")), leaf


@pytest.mark.parametrize("family", families.names())
def test_a_name_stands_for_one_layer_however_it_is_joined(family: str) -> None:
    """All layers of the usual models of all families: no name of one program is another layer's of another."""
    for outline in usual_outlines(family):
        known = outline.spellings
        stands_for: dict[str, tuple[ModulePath, int]] = {}
        for dialect in outline.dialects.values():
            for path in filter(dialect.holds, outline.layers):
                for piece, name in enumerate(dialect.names(path)[0]):
                    assert stands_for.setdefault(name, (path, piece)) == (path, piece)
                    found = known.find(f"{name}.lora_up.weight")
                    assert found is not None
                    assert (found[0].path, found[0].piece) == (path, piece), name
            for path in outline.layers:
                for prefix in ("diffusion_model.", "lycoris_", "") if path[0] == "denoiser" else ():
                    name = prefix + (path[1].replace(".", "_") if prefix.endswith("_") else path[1])
                    found = known.find(f"{name}.alpha")
                    assert found is not None
                    assert found[0].path == path


def test_a_number_that_names_two_encoders_names_none() -> None:
    assert spellings("sdxl").find(f"lora_te_{CLIP.replace('.', '_')}.alpha") is None
    assert spellings("sdxl").find("lora_te_text_model_encoder_layers_31_mlp_fc1.alpha") is not None, (
        "CLIP-G alone has it"
    )
