"""The record of Stable Diffusion XL: where its nets stand in files, and how they are run and adapted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan
from sfumato.config import FamilyOptions, LossConfig, NoiseConfig
from sfumato.data.batch import Cond
from sfumato.errors import UserError
from sfumato.families.sd import family as sd
from sfumato.families.sd.block_weights import SDXL
from sfumato.families.sd.family import check_channels, prediction, text_width, without_old_average
from sfumato.families.sd.network_args import block_number, target_layer
from sfumato.families.sd.strategies import SdTokenize
from sfumato.families.sdxl.control import CONTROL
from sfumato.families.sdxl.facts import SIZE_WIDTH, SIZES, Options
from sfumato.families.sdxl.folder import check_unet, new_folder, scheduler, zero_snr
from sfumato.families.sdxl.lllite import LLLITE
from sfumato.families.sdxl.names import CLIP_G, CLIP_L, PASSTHROUGH, UNET_TARGETS, VAE, unet_keys
from sfumato.families.sdxl.net import UNet, blocks
from sfumato.families.sdxl.network_args import UNET_BLOCKS
from sfumato.families.sdxl.strategies import LATENTS, OUTPUTS, SdxlEncode, SdxlTokenize
from sfumato.formats.dialect import Dialect, usual
from sfumato.formats.planned import Writable
from sfumato.models.autoencoders import vae_component
from sfumato.models.base import Family, Models, SampleInfo, TokenizerSpec, encoder_rate
from sfumato.models.components import Checkpoint, Config, denoiser
from sfumato.models.encoders.clip import CLIP_TARGETS, clip_component
from sfumato.models.encoders.tokenizers import clip_tokenizer
from sfumato.models.layers import Shapes, timestep_embedding
from sfumato.tensors.noise import NoiseProcess

SCALE = 0.13025
"""Factor from raw latents to those of the denoiser."""
PAD = "!"
"""What bigG was trained with after the end of a caption: the token 0."""
UNUSED = ("text_model.encoder.layers.11.", "text_model.final_layer_norm.")
"""What stands behind the states of CLIP-L that are used, so that it has no gradient."""


# --- files ---


def _unet(shapes: Shapes, config: Config) -> UNet:
    check_channels(shapes)
    check_unet(config, shapes)
    return UNet.of(shapes)


COMPONENTS = (
    denoiser(
        _unet,
        unet_keys,
        native="input_blocks.0.0.weight",
        diffusers="conv_in.weight",
        title="the U-Net",
        folder="unet",
    ),
    clip_component("clip_l", (CLIP_L,), "text_encoder", "quick_gelu"),
    clip_component("clip_g", (CLIP_G,), "text_encoder_2", "gelu", openclip=True, projected=True),
    vae_component((VAE,), SCALE),
)


def complete(options: FamilyOptions, source: Checkpoint) -> tuple[Options, Checkpoint]:
    """The prediction type, from the files. Errors: `UserError` for what is of another model."""
    text, unet = source.components["clip_g"].shapes(), source.components["denoiser"].shapes()
    if "text_projection.weight" not in text:
        raise UserError(
            f"{source.components['clip_g'].where}: the text encoder clip_g lacks its text_projection, which the U-Net "
            "needs"
        )
    pooled, label = text["text_projection.weight"][0], unet["label_emb.0.0.weight"][1]
    if label != pooled + SIZES * SIZE_WIDTH:
        raise UserError(
            f"{source.path}: the U-Net takes {label} numbers beside the text, where {pooled} of the pooled text and "
            f"{SIZES} x {SIZE_WIDTH} of the image's sizes were expected: it is no base model of Stable Diffusion XL"
        )
    scheduler(source)
    o = Options.of(options)
    v = o.v_parameterization or prediction(source) == "v"
    return replace(o, v_parameterization=v), source


def adjust_single_file(models: Models, tensors: dict[str, Writable]) -> dict[str, Writable]:
    """Without an old average, and with the empty tensors by which ComfyUI knows a model that predicts v, and one whose
    last timestep is pure noise (comfy/supported_models.py)."""
    marks = {"v_pred": Options.of(models.options).v_parameterization, "ztsnr": zero_snr(models)}
    new = {name: torch.zeros(0) for name, holds in marks.items() if holds and name not in tensors}
    return {**without_old_average(models, tensors), **new}


def _clip_g_tokenizer(folder: Path | None) -> Any:
    """bigG's tokenizer; in a folder of CLIP-L's only the padding differs from it."""
    tokenizer = clip_tokenizer(folder, pad=PAD)
    if tokenizer.pad_token != PAD:
        tokenizer.pad_token = PAD
    return tokenizer


# --- running ---


def tokenize(models: Models) -> SdxlTokenize:
    """Captions -> tokens."""
    o = Options.of(models.options)
    length, weighted = o.max_token_length, o.weighted_captions
    return SdxlTokenize({name: SdTokenize(models.tokenizers[name], length, weighted) for name in ("clip_l", "clip_g")})


def condition(models: Models, cond: Cond, setting: SampleInfo) -> Cond:
    """{"hidden", "y": (b, p + 6 * 256) the pooled text, then the sizes' sines and cosines in fp32}; see
    `SampleInfo.sizes`."""
    sizes = timestep_embedding(setting.sizes.flatten(), SIZE_WIDTH).reshape(len(setting.sizes), -1)
    return {"hidden": cond["hidden"], "y": torch.cat([cond["pooled"].float(), sizes.to(cond["pooled"].device)], 1)}


def predict(net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Noise or velocity."""
    prediction: Tensor = net(x, t, cond["hidden"], cond["y"])
    return prediction


# --- training ---


def process(models: Models, noise: NoiseConfig, loss: LossConfig) -> NoiseProcess:
    """DDPM with what the model predicts, down to pure noise if it is made for it."""
    whole = noise.zero_terminal_snr or zero_snr(models)
    return sd.process(models, replace(noise, zero_terminal_snr=whole), loss)


def trainable(options: FamilyOptions, plan: AdapterPlan | None) -> frozenset[str] | None:
    """A text encoder whose rate is 0 is left as it is."""
    o = Options.of(options)
    rates = {"clip_l": o.learning_rate_te1, "clip_g": o.learning_rate_te2}
    return None if plan is not None else frozenset(name for name, rate in rates.items() if rate != 0)


def rate(options: FamilyOptions, component: str, path: str) -> float | None:
    """The rate of a weight when a whole model is trained."""
    if component == "denoiser":
        rates, number = Options.of(options).block_lr, block_number(UNET_BLOCKS, path)
        return rates[number] if rates and number is not None else None
    unused = component == "clip_l" and path.startswith(UNUSED)
    return 0.0 if unused else encoder_rate(options, component, path)


def dialects(models: Models) -> Mapping[str, Dialect]:
    """Adapter names: kohya's and ComfyUI's are built on the single file's, PEFT's on diffusers'."""
    keys = {"denoiser": unet_keys(models.denoiser.state_dict())}
    kohya = {"denoiser": "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_"}
    comfy = {
        "denoiser": "diffusion_model.",
        **{name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g")},
    }
    peft = {"denoiser": "unet.", "clip_l": "text_encoder.", "clip_g": "text_encoder_2."}
    return usual(kohya, comfy, peft, keys)


FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    components=COMPONENTS,
    optional=frozenset({"vae"}),
    passthrough_keys=PASSTHROUGH,
    complete=complete,
    tokenizer_specs={
        "clip_l": TokenizerSpec(folder="tokenizer", make=clip_tokenizer),
        "clip_g": TokenizerSpec(folder="tokenizer_2", make=_clip_g_tokenizer),
    },
    new_folder=new_folder,
    adjust_single_file=adjust_single_file,
    tokenize=tokenize,
    encode=lambda models: SdxlEncode(),
    latents=LATENTS,
    outputs=lambda models: OUTPUTS,
    process=process,
    condition=condition,
    caption=lambda shapes: {
        "hidden": (77, text_width(shapes)),
        "pooled": (shapes["label_emb.0.0.weight"][1] - SIZES * SIZE_WIDTH,),
    },
    predict=predict,
    blocks=blocks,
    dialects=dialects,
    targets={
        "denoiser": UNET_TARGETS,
        "clip_l": CLIP_TARGETS,
        "clip_g": CLIP_TARGETS,
    },
    target_layer=target_layer,
    trainable=trainable,
    rate=rate,
    block_weights=SDXL,
    lllite=LLLITE,
    encoder_lr_order=("clip_l", "clip_g"),
    control=CONTROL,
)
