"""The record of FLUX.1: where its nets stand in files, and how they are run and adapted."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan
from sfumato.config import FamilyOptions, LossConfig, NoiseConfig
from sfumato.data.batch import Cond
from sfumato.data.strategies import TextEncoderOutputsCachingStrategy
from sfumato.errors import UserError
from sfumato.families.flux.control import CONTROL
from sfumato.families.flux.facts import (
    CLIP_L,
    GUIDANCE,
    PATCH_CHANNELS,
    SAMPLE_GUIDANCE,
    T5XXL,
    VAE,
    Completed,
    Options,
)
from sfumato.families.flux.names import TARGETS, flux_keys, xlabs_keys
from sfumato.families.flux.net import PATCH, Flux, blocks, transformer_config
from sfumato.families.flux.network_args import target_layer
from sfumato.families.flux.strategies import LATENTS, FluxEncode, FluxTokenize, outputs
from sfumato.formats.dialect import Dialect, usual
from sfumato.formats.names import KeyMap
from sfumato.models.autoencoders import FLUX_SCALE, FLUX_SHIFT, vae_component
from sfumato.models.base import Family, Models, NewFolder, SampleInfo, TokenizerSpec
from sfumato.models.components import Checkpoint, Config, check_config, denoiser
from sfumato.models.detection import PREFIX
from sfumato.models.encoders.clip import CLIP_TARGETS, clip_component
from sfumato.models.encoders.t5 import EMBEDDING, T5_TARGETS, t5_component, trains_t5
from sfumato.models.encoders.tokenizers import clip_tokenizer, t5_home, t5_vocabulary
from sfumato.models.layers import Shapes, numbered
from sfumato.models.new_folder import flow_folder
from sfumato.tensors.flow import Flow, flux_mu, schedule
from sfumato.tensors.noise import NoiseProcess

SHIFT = 3.1582
"""Shift towards noise while training: e^1.15, which samplers use for images of 1024 x 1024."""
LENGTHS = {True: 512, False: 256}
"""T5's tokens of a caption, for a model that takes a guidance (dev) and for one that does not (schnell)."""
PASSTHROUGH = re.compile(r"text_encoders\.(clip_l|t5xxl)\.(logit_scale|text_projection(\.weight)?)")
"""What bundles hold besides the nets."""
log = logging.getLogger(__name__)


# --- files ---


def transformer(shapes: Shapes, config: Config) -> Flux:
    """A net without values for tensors of these shapes. Errors: `UserError` if it takes more, or its config asks for
    another."""
    check_patches(shapes["img_in.weight"][1])
    net = Flux.of(shapes)
    check_config(
        config, {"patch_size": 1, "axes_dims_rope": list(net.axes), "guidance_embeds": net.guidance_in is not None}
    )
    return net


def check_patches(channels: int) -> None:
    """Errors: `UserError` if a patch of latents has other channels than those of an image alone."""
    if channels != PATCH_CHANNELS:
        raise UserError(
            f"the transformer takes {channels} channels a patch, not {PATCH_CHANNELS} (for filling, editing or control)"
        )


COMPONENTS = (
    denoiser(transformer, flux_keys, prefixes=("", PREFIX), native="img_in.weight", diffusers="x_embedder.weight"),
    clip_component("clip_l", (CLIP_L,), "text_encoder", "quick_gelu", flag="clip_l", bundled=False),
    t5_component((T5XXL,), "text_encoder_2"),
    vae_component((VAE,), FLUX_SCALE, FLUX_SHIFT, channels=LATENTS.channels, bundled=False),
)


def complete(options: FamilyOptions, source: Checkpoint) -> tuple[Completed, Checkpoint]:
    """What goes by the version, from the file.

    Errors: `UserError` for a guidance that the model does not take, and for encoders of other widths.
    """
    o, shapes = Options.of(options), source.components["denoiser"].shapes()
    guided = any(name.startswith("guidance_in.") for name in shapes)
    wrong = width_mismatches(
        source, {"clip_l": shapes["vector_in.in_layer.weight"][1], "t5xxl": shapes["txt_in.weight"][1]}
    )
    if not guided and o.guidance_scale is not None:
        wrong.append(f"guidance_scale: {source.path} is FLUX.1 schnell, which takes no guidance; leave it out")
    if wrong:
        raise UserError(*wrong)
    guidance = GUIDANCE if o.guidance_scale is None else o.guidance_scale
    values: dict[str, Any] = {
        **asdict(o),
        **counts(shapes),
        "guidance_scale": guidance if guided else None,
        "t5xxl_max_token_length": o.t5xxl_max_token_length or LENGTHS[guided],
        "model_type": "flux",
    }
    return Completed(**values, guided=guided), source


def width_mismatches(source: Checkpoint, widths: Mapping[str, int]) -> list[str]:
    """A message for each text encoder whose states have another width than the transformer takes; `widths`: by
    encoder."""
    tokens = {"clip_l": "text_model.embeddings.token_embedding.weight", "t5xxl": EMBEDDING}
    found = {name: source.components[name].shapes()[tokens[name]][1] for name in widths}
    return [
        f"{name}: its states are {found[name]} wide, the transformer takes {width}: it is another model's text encoder"
        for name, width in widths.items()
        if found[name] != width
    ]


def counts(shapes: Shapes) -> dict[str, int]:
    """How many blocks of each kind there are, by the options' names."""
    return {name: len(numbered(shapes, name)) for name in ("double_blocks", "single_blocks")}


SCHEDULE = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
"""The settings of diffusers' sampler for dev; Chroma's steps are the same."""


def new_folder(models: Models) -> NewFolder | None:
    """What `FluxPipeline.from_pretrained` reads besides weights."""
    net = cast(Flux, models.denoiser)
    guided = net.guidance_in is not None
    transformer = {
        **transformer_config(net, "FluxTransformer2DModel"),
        "pooled_projection_dim": cast(nn.Linear, net.vector_in.in_layer).in_features,
        "guidance_embeds": guided,
    }
    return flow_folder(models, "FluxPipeline", transformer, SCHEDULE if guided else {"shift": 1.0})


# --- running ---


def tokenize(models: Models) -> FluxTokenize:
    """Captions -> tokens."""
    o, tokenizers = Completed.of(models.options), models.tokenizers
    return FluxTokenize(
        tokenizers["clip_l"], tokenizers["t5xxl"], o.t5xxl_max_token_length, masked=o.apply_t5_attn_mask
    )


def outputs_strategy(models: Models) -> TextEncoderOutputsCachingStrategy:
    """What is cached of captions."""
    return outputs(masked=Completed.of(models.options).apply_t5_attn_mask)


def process(models: Models, noise: NoiseConfig, loss: LossConfig) -> NoiseProcess:
    """Rectified flow."""
    return Flow.of(models.options, noise, shift=SHIFT)


def condition(models: Models, cond: Cond, setting: SampleInfo) -> Cond:
    """Adds the guidance where the model takes one."""
    guidance, pooled = Completed.of(models.options).guidance_scale, cond["pooled"]
    if guidance is not None:
        common = torch.full((len(pooled),), guidance, device=pooled.device)
        return {**cond, "guidance": common if setting.guidance is None else setting.guidance}
    if setting.guidance is not None and bool((setting.guidance != SAMPLE_GUIDANCE).any()):
        log.warning("guidance_scale (--g) has no effect: FLUX.1 schnell takes no guidance")
    return cond


def predict(net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The velocity."""
    prediction: Tensor = net(x, t / 1000, cond["t5"], cond["pooled"], cond.get("guidance"), cond.get("t5_mask"))
    return prediction


def sigmas(models: Models, steps: int, latent_pixels: int, shift: float | None) -> Tensor:
    """The larger the image, the longer dev stays with noise; schnell's steps are even."""
    return schedule(steps, mu=flux_mu(latent_pixels // PATCH**2) if Completed.of(models.options).guided else None)


# --- training ---


def dialects(models: Models) -> Mapping[str, Dialect]:
    """Adapter names of a model with this transformer; those of XLabs are only read."""
    shapes = {name: tuple(t.shape) for name, t in models.denoiser.state_dict().items()}
    xlabs = Dialect(name="xlabs", prefix={"denoiser": ""}, keys={"denoiser": xlabs_keys(shapes)})
    return {**adapter_dialects(flux_keys(shapes)), "xlabs": xlabs}


def adapter_dialects(keys: KeyMap) -> dict[str, Dialect]:
    """Adapter names: kohya's and ComfyUI's are built on the names of the file, PEFT's on diffusers', which loads none
    for T5."""
    kohya = {"denoiser": "lora_unet_", "clip_l": "lora_te1_", "t5xxl": "lora_te3_"}
    comfy = {"denoiser": "diffusion_model.", "clip_l": CLIP_L, "t5xxl": T5XXL}
    peft = {"denoiser": "transformer.", "clip_l": "text_encoder."}
    return usual(kohya, comfy, peft, {"denoiser": keys})


def trainable(options: FamilyOptions, plan: AdapterPlan | None) -> frozenset[str]:
    """T5 is trained only where it is asked for."""
    return frozenset({"clip_l", "t5xxl"} if trains_t5(options, plan) else {"clip_l"})


FAMILY = Family(
    name="flux",
    title="FLUX.1",
    components=COMPONENTS,
    passthrough_keys=PASSTHROUGH,
    complete=complete,
    tokenizer_specs={
        # CLIP's vocabulary comes with sfumato, so that a folder given for no more than a tokenizer is T5's.
        "clip_l": TokenizerSpec(folder="tokenizer", make=clip_tokenizer, alone=False),
        "t5xxl": TokenizerSpec(folder="tokenizer_2", make=t5_vocabulary, home=t5_home),
    },
    new_folder=new_folder,
    tokenize=tokenize,
    encode=lambda models: FluxEncode(),
    latents=LATENTS,
    outputs=outputs_strategy,
    process=process,
    condition=condition,
    caption=lambda shapes: {
        "pooled": (shapes["vector_in.in_layer.weight"][1],),
        "t5": (512, shapes["txt_in.weight"][1]),
    },
    predict=predict,
    sigmas=sigmas,
    blocks=blocks,
    dialects=dialects,
    targets={
        "denoiser": TARGETS,
        "clip_l": CLIP_TARGETS,
        "t5xxl": T5_TARGETS,
    },
    target_layer=target_layer,
    trainable=trainable,
    encoder_lr_order=("clip_l", "t5xxl"),
    control=CONTROL,
)
