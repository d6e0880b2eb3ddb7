"""The record of Anima: where its nets stand in files, and how they are run and adapted."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from functools import partial
from typing import cast

from torch import Tensor, nn

from sfumato.config import FamilyOptions, LossConfig, NoiseConfig
from sfumato.data.batch import Cond
from sfumato.errors import UserError
from sfumato.families.anima.facts import BESIDE, NET, PATCH_CHANNELS, QWEN3, SHIFT, VAE, Completed, Options
from sfumato.families.anima.folder import new_folder
from sfumato.families.anima.lllite import LLLITE
from sfumato.families.anima.names import TARGETS, anima_keys, dialects
from sfumato.families.anima.net import PATCH, STRETCH, Anima, blocks
from sfumato.families.anima.strategies import LATENTS, OUTPUTS, AnimaEncode, AnimaTokenize
from sfumato.models.base import Family, Models, TokenizerSpec
from sfumato.models.components import Checkpoint, Config, check_config, denoiser, matching
from sfumato.models.detection import PREFIX
from sfumato.models.encoders.llm import LLM_TARGETS, qwen3_component
from sfumato.models.encoders.tokenizers import qwen_home, qwen_vocabulary, t5_home, t5_vocabulary
from sfumato.models.layers import Shapes, numbered
from sfumato.models.qwen_vae import qwen_vae_component
from sfumato.tensors.flow import Flow, schedule
from sfumato.tensors.noise import NoiseProcess

TRAINED_SHIFT = 1.0
"""Shift towards noise while training: none."""
RATES = {
    r"llm_adapter\..*": "llm_adapter_lr",
    r"blocks\.\d+\.self_attn\..*": "self_attn_lr",
    r"blocks\.\d+\.cross_attn\..*": "cross_attn_lr",
    r"blocks\.\d+\.mlp\..*": "mlp_lr",
    r"(blocks\.\d+|final_layer)\.adaln_modulation.*": "mod_lr",
}
"""Pattern of weights' paths -> the option of their rate."""


# --- files ---


def transformer(shapes: Shapes, config: Config) -> Anima:
    """A net without values for tensors of these shapes. Errors: `UserError` if it is one of videos, or its config asks
    for another."""
    if (channels := shapes["x_embedder.proj.1.weight"][1]) != PATCH_CHANNELS:
        raise UserError(f"the transformer takes {channels} channels a patch, not {PATCH_CHANNELS} (for videos)")
    net = Anima.of(shapes)
    check_config(
        config,
        {
            "patch_size": [1, PATCH, PATCH],
            "rope_scale": [1.0, STRETCH, STRETCH],
            "concat_padding_mask": True,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": False,
        },
    )
    return net


COMPONENTS = (
    replace(
        denoiser(
            transformer,
            lambda shapes: anima_keys(),
            native="x_embedder.proj.1.weight",
            diffusers="patch_embed.proj.weight",
            prefixes=(NET, PREFIX, ""),
        ),
        beside=BESIDE,
        # Positions are computed; NVIDIA's own files hold counters of their training besides.
        unused_keys=matching(r"pos_embedder\..*|accum_\w+|(.*\.)?_extra_state"),
    ),
    qwen3_component((QWEN3,), "text_encoder"),
    qwen_vae_component((VAE,)),
)


def complete(options: FamilyOptions, source: Checkpoint) -> tuple[Completed, Checkpoint]:
    """The number of blocks, from the file. Errors: `UserError` for a Qwen3 of another width."""
    shapes = source.components["denoiser"].shapes()
    wanted = shapes["llm_adapter.blocks.0.cross_attn.k_proj.weight"][1]
    found = source.components["qwen3"].shapes()["embed_tokens.weight"][1]
    if found != wanted:
        raise UserError(
            f"qwen3: its states are {found} wide, the transformer takes {wanted}: it is another Qwen3 than the 0.6B"
        )
    return Completed(**asdict(Options.of(options)), blocks=len(numbered(shapes, "blocks"))), source


# --- running ---


def tokenize(models: Models) -> AnimaTokenize:
    """Captions -> tokens."""
    o, tokenizers = Completed.of(models.options), models.tokenizers
    return AnimaTokenize(tokenizers["qwen3"], tokenizers["denoiser"], o.qwen3_max_token_length, o.t5_max_token_length)


def process(models: Models, noise: NoiseConfig, loss: LossConfig) -> NoiseProcess:
    """Rectified flow."""
    return Flow.of(models.options, noise, shift=TRAINED_SHIFT)


def predict(net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The velocity."""
    prediction: Tensor = net(x, t / 1000, cond["qwen3"], cond["t5_ids"], cond.get("qwen3_mask"), cond.get("t5_mask"))
    return prediction


def sigmas(models: Models, steps: int, latent_pixels: int, shift: float | None) -> Tensor:
    """The same for images of all sizes."""
    return schedule(steps, mu=math.log(shift or SHIFT))


# --- training ---


def rate(options: FamilyOptions, component: str, path: str) -> float | None:
    """By part of the transformer; ends and norms before the blocks have the common rate."""
    if component != "denoiser":
        return None
    name = next((name for pattern, name in RATES.items() if re.fullmatch(pattern, path)), None)
    return None if name is None else cast("float | None", getattr(options, name))


FAMILY = Family(
    name="anima",
    title="Anima",
    components=COMPONENTS,
    complete=complete,
    tokenizer_specs={
        "qwen3": TokenizerSpec(folder="tokenizer", make=partial(qwen_vocabulary, qwen3=True), home=qwen_home),
        # The text adapter's; a folder given for no more than a tokenizer is Qwen3's.
        "denoiser": TokenizerSpec(
            folder="t5_tokenizer",
            make=t5_vocabulary,
            home=t5_home,
            alone=False,
            flag="t5_tokenizer_path",
            rows=lambda net: cast(Anima, net).llm_adapter.embed.num_embeddings,
        ),
    },
    new_folder=new_folder,
    tokenize=tokenize,
    encode=lambda models: AnimaEncode(),
    latents=LATENTS,
    outputs=lambda models: OUTPUTS,
    process=process,
    caption=lambda shapes: {
        "qwen3": (128, shapes["llm_adapter.blocks.0.cross_attn.k_proj.weight"][1]),
        "t5_ids": (128,),
    },
    predict=predict,
    sigmas=sigmas,
    blocks=blocks,
    dialects=lambda models: dialects(),
    targets={"denoiser": TARGETS, "qwen3": LLM_TARGETS},
    rate=rate,
    lllite=LLLITE,
    encoder_lr_order=("qwen3",),
)
