"""The record of Lumina Image 2.0: where its nets stand in files, and how they are run and adapted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from sfumato.config import FamilyOptions, LossConfig, NoiseConfig
from sfumato.data.batch import Cond
from sfumato.errors import UserError
from sfumato.families.lumina2.facts import GEMMA, SHIFT, VAE, Options
from sfumato.families.lumina2.names import TARGETS, UNUSED, transformer_keys
from sfumato.families.lumina2.net import NORM_EPS, PATCH, Block, Lumina2, blocks
from sfumato.families.lumina2.network_args import target_layer
from sfumato.families.lumina2.strategies import LATENTS, OUTPUTS, LuminaEncode, LuminaTokenize
from sfumato.formats.dialect import Dialect, usual
from sfumato.formats.planned import Writable
from sfumato.models.autoencoders import FLUX_SCALE, FLUX_SHIFT, vae_component
from sfumato.models.base import Family, Models, NewFolder, TokenizerSpec
from sfumato.models.components import Checkpoint, Config, check_config, denoiser, matching
from sfumato.models.detection import PREFIX
from sfumato.models.encoders.llm import LLM_TARGETS, gemma2_component
from sfumato.models.encoders.tokenizers import gemma_home, gemma_vocabulary
from sfumato.models.layers import Shapes
from sfumato.models.new_folder import flow_folder
from sfumato.tensors.flow import Flow, schedule
from sfumato.tensors.guidance import Guidance, GuidanceInfo, Truncated
from sfumato.tensors.noise import NoiseProcess

TRANSFORMER = "transformer."
"""After what begins the names of a text encoder in a bundle."""
SAMPLE_SIZE = 128
"""Latent pixels a side of the images that the published model is made for."""


# --- files ---


def transformer(shapes: Shapes, config: Config) -> Lumina2:
    """A net without values for tensors of these shapes. Errors: `UserError` for models that take more than an image and
    a text, and for a config of another net."""
    channels = LATENTS.channels * PATCH**2
    if (found := shapes["x_embedder.weight"][1]) != channels:
        raise UserError(
            f"the transformer takes {found} channels a patch, not {channels} (a model for filling or editing): not "
            "supported yet"
        )
    net = Lumina2.of(shapes)
    check_config(
        config, {"patch_size": PATCH, "axes_dim_rope": list(net.axes), "norm_eps": NORM_EPS, "scaling_factor": 1.0}
    )
    return net


COMPONENTS = (
    replace(
        denoiser(
            transformer,
            transformer_keys,
            prefixes=("", PREFIX),
            native="cap_embedder.1.weight",
            diffusers="time_caption_embed.caption_embedder.1.weight",
        ),
        unused_keys=matching(re.escape(UNUSED)),
    ),
    gemma2_component((GEMMA + TRANSFORMER,), "text_encoder"),
    vae_component((VAE,), FLUX_SCALE, FLUX_SHIFT, channels=LATENTS.channels, bundled=False),
)


def complete(options: FamilyOptions, source: Checkpoint) -> tuple[Options, Checkpoint]:
    """Nothing is left to complete. Errors: `UserError` for a text encoder of another width."""
    expected = source.components["denoiser"].shapes()["cap_embedder.0.weight"][0]
    found = source.components["gemma2"].shapes()["embed_tokens.weight"][1]
    if found != expected:
        raise UserError(
            f"gemma2: its states are {found} wide, the transformer takes {expected}: it is another text encoder"
        )
    return Options.of(options), source


def adjust_single_file(models: Models, tensors: dict[str, Writable]) -> dict[str, Writable]:
    """With the norm that nothing applies, which folders leave out and Lumina's own code asks for; it was never
    trained."""
    mark = "cap_embedder.1.weight"
    found = next((name for name in tensors if name.endswith(mark)), None)
    if models.source.layout != "diffusers" or found is None:
        return tensors
    width, dtype = tensors[found].shape[0], tensors[found].dtype
    return {**tensors, found.removesuffix(mark) + UNUSED: torch.ones(width, dtype=dtype)}


def new_folder(models: Models) -> NewFolder | None:
    """What `Lumina2Pipeline.from_pretrained` reads besides weights."""
    net = cast(Lumina2, models.denoiser)
    block = cast(Block, net.layers[0])
    heads, shared, _ = block.attention.counts
    transformer = {
        "_class_name": "Lumina2Transformer2DModel",
        "sample_size": SAMPLE_SIZE,
        "patch_size": PATCH,
        "in_channels": LATENTS.channels,
        "hidden_size": net.x_embedder.out_features,
        "num_layers": len(net.layers),
        "num_refiner_layers": len(net.noise_refiner),
        "num_attention_heads": heads,
        "num_kv_heads": shared,
        # diffusers rounds the gated net's width up to a multiple of this number.
        "multiple_of": block.feed_forward.w1.out_features,
        "axes_dim_rope": list(net.axes),
        "cap_feat_dim": cast(nn.Linear, net.cap_embedder[1]).in_features,
    }
    return flow_folder(models, "Lumina2Pipeline", transformer, {"shift": SHIFT})


# --- running ---


def tokenize(models: Models) -> LuminaTokenize:
    """Captions -> tokens."""
    o = Options.of(models.options)
    return LuminaTokenize(models.tokenizers["gemma2"], o.gemma2_max_token_length, o.system_prompt)


def tokenize_negative(models: Models) -> LuminaTokenize:
    """Negative prompts go without the system prompt, as in Lumina2Pipeline."""
    return replace(tokenize(models), system=None)


def process(models: Models, noise: NoiseConfig, loss: LossConfig) -> NoiseProcess:
    """Rectified flow."""
    return Flow.of(models.options, noise, shift=SHIFT)


def predict(net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The velocity; the net's own clock and velocity go from noise to image."""
    prediction: Tensor = net(x, 1 - t / 1000, cond["gemma2"], cond.get("gemma2_mask"))
    return -prediction


def sigmas(models: Models, steps: int, latent_pixels: int, shift: float | None) -> Tensor:
    """The same for images of all sizes."""
    return schedule(steps, mu=math.log(shift or SHIFT))


def guidance(models: Models, info: GuidanceInfo) -> Guidance:
    """In the first steps alone, and renormalised."""
    return Truncated(
        info.scale, info.steps, cfg_trunc_ratio=info.values["cfg_trunc_ratio"], renorm_cfg=info.values["renorm_cfg"]
    )


# --- training ---


def dialects(models: Models) -> Mapping[str, Dialect]:
    """Adapter names: kohya's and ComfyUI's are built on the names of the file, PEFT's on diffusers', which loads none
    for Gemma."""
    keys = transformer_keys({name: tuple(t.shape) for name, t in models.denoiser.state_dict().items()})
    kohya = {"denoiser": "lora_unet_", "gemma2": "lora_te_"}
    comfy = {"denoiser": "diffusion_model.", "gemma2": f"{GEMMA}{TRANSFORMER}model."}
    return usual(kohya, comfy, {"denoiser": TRANSFORMER}, {"denoiser": keys})


FAMILY = Family(
    name="lumina2",
    title="Lumina Image 2.0",
    components=COMPONENTS,
    passthrough_keys=re.compile(re.escape(GEMMA) + r"(logit_scale|spiece_model)"),
    complete=complete,
    tokenizer_specs={"gemma2": TokenizerSpec(folder="tokenizer", make=gemma_vocabulary, home=gemma_home)},
    new_folder=new_folder,
    adjust_single_file=adjust_single_file,
    tokenize=tokenize,
    tokenize_negative=tokenize_negative,
    encode=lambda models: LuminaEncode(),
    latents=LATENTS,
    outputs=lambda models: OUTPUTS,
    process=process,
    caption=lambda shapes: {"gemma2": (128, shapes["cap_embedder.1.weight"][1])},
    predict=predict,
    sigmas=sigmas,
    guidance=guidance,
    blocks=blocks,
    dialects=dialects,
    targets={"denoiser": TARGETS, "gemma2": LLM_TARGETS},
    target_layer=lambda options, plan, target: target_layer(plan, target),
    encoder_lr_order=("gemma2",),
)
