"""The record of Stable Diffusion 1.x and 2.x: where its nets stand in files, and how they are run and adapted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from sfumato.config import FamilyOptions, LossConfig, NoiseConfig
from sfumato.data.batch import Cond
from sfumato.errors import UserError
from sfumato.families.sd.block_weights import SD
from sfumato.families.sd.control import CONTROL
from sfumato.families.sd.facts import Options, UnetOptions
from sfumato.families.sd.folder import check_unet, new_folder
from sfumato.families.sd.names import CLIP_H, CLIP_L, PASSTHROUGH, TARGETS, VAE, unet_keys
from sfumato.families.sd.net import UNet, blocks, readers
from sfumato.families.sd.network_args import target_layer
from sfumato.families.sd.strategies import LATENTS, OUTPUTS, SdEncode, SdTokenize
from sfumato.formats.dialect import Dialect, usual
from sfumato.formats.planned import Writable, renamed
from sfumato.models import locate
from sfumato.models.autoencoders import vae_component
from sfumato.models.base import Family, Models, TokenizerSpec
from sfumato.models.components import Checkpoint, Config, denoiser
from sfumato.models.encoders.clip import CLIP_TARGETS, LAYERS, clip_component
from sfumato.models.encoders.tokenizers import clip_tokenizer
from sfumato.models.layers import Shapes, count_layers
from sfumato.models.saving import unchanged
from sfumato.tensors.noise import DDPM, NoiseProcess

LAYERS_USED = 23
"""Layers of OpenCLIP-H that 2.x uses; files hold one more."""
_MIDDLE = "middle_block.1.proj_in.weight"


# --- files ---


def _unet(shapes: Shapes, config: Config) -> UNet:
    check_channels(shapes)
    check_unet(config, shapes)
    return UNet.of(shapes)


def check_channels(shapes: Shapes) -> None:
    """Errors: `UserError` for a U-Net that takes more than latents."""
    channels = shapes["input_blocks.0.0.weight"][1]
    if channels != LATENTS.channels:
        raise UserError(
            f"the U-Net takes {channels} channels (an inpainting, depth or editing model), which is not supported yet"
        )


def _unused_layer(names: Collection[str]) -> Collection[str]:
    """OpenCLIP's last layer, whose states 2.x does not use."""
    layers = {int(name.split(".")[2]) for name in names if name.startswith("transformer.resblocks.")}
    unused = f"transformer.resblocks.{max(layers)}." if layers and len(layers) != LAYERS_USED else "-"
    return [name for name in names if name.startswith(unused)]


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
    clip_component("clip_h", (CLIP_H,), "text_encoder", "gelu", openclip=True, unused_keys=_unused_layer),
    vae_component((VAE,)),
)


def complete(options: FamilyOptions, source: Checkpoint) -> tuple[Options, Checkpoint]:
    """Version and prediction type, from the files. Errors: `UserError` if the options name the other version."""
    o, v2 = Options.of(options), len(source.components["denoiser"].shapes()[_MIDDLE]) == 2
    if o.v2 is not None and o.v2 != v2:
        is_, not_ = ("2.x", "1.x") if v2 else ("1.x", "2.x")
        raise UserError(f"v2: {source.path} is Stable Diffusion {is_}, not {not_}; leave v2 out")
    wanted, other = ("clip_h", "clip_l") if v2 else ("clip_l", "clip_h")
    if wanted not in source.components:
        raise UserError(f"{source.path} holds no text encoder of this version; a whole model is needed")
    layers = count_layers(source.components[wanted].shapes(), LAYERS)
    if not 1 <= (o.clip_skip or 1) <= layers:
        raise UserError(
            f"clip_skip: {o.clip_skip}; the text encoder has {layers} layers, so 1 to {layers} was expected"
        )
    components = {name: each for name, each in source.components.items() if name != other}
    v = o.v_parameterization or prediction(source) == "v"
    return replace(o, v2=v2, v_parameterization=v), replace(source, components=components)


def prediction(source: Checkpoint) -> str:
    """What the U-Net predicts, "v" or else; empty: the files do not say."""
    scheduler = source.path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        return {"v_prediction": "v"}.get(str(locate.read_json(scheduler).get("prediction_type")), "")
    named = source.metadata.get("modelspec.prediction_type", "")
    marked = "v_pred" in source.passthrough or source.metadata.get("modelspec.architecture", "").endswith("-768-v")
    return "v" if marked else named


def without_old_average(models: Models, tensors: dict[str, Writable]) -> dict[str, Writable]:
    """An average of the old U-Net beside a new one would be taken for the new one's by programs that prefer it."""
    weights = models.source.components["denoiser"]
    others = {name: t for name, t in tensors.items() if not name.startswith("model_ema.")}
    if len(others) == len(tensors):
        return tensors
    own = renamed(weights.key_format.read, {name: tensors[f"{weights.prefix}{name}"] for name in weights.tensors})
    return tensors if unchanged(own, weights.unmerged()) else others


def adjust_single_file(models: Models, tensors: dict[str, Writable]) -> dict[str, Writable]:
    """What programs that read single files expect besides the nets, and without what they would misread."""
    source = models.source
    tensors = without_old_average(models, tensors)
    layers = {int(name.split(".")[4]) for name in tensors if name.startswith(f"{CLIP_H}transformer.resblocks.")}
    if not layers or not source.path.is_dir():
        return tensors
    # A last layer of zeros, which passes its input on: readers expect one more than is used, and folders hold none.
    prefix, added = (f"{CLIP_H}transformer.resblocks.{n}." for n in (max(layers), max(layers) + 1))
    return tensors | {
        added + name.removeprefix(prefix): torch.zeros(t.shape, dtype=t.dtype)
        for name, t in tensors.items()
        if name.startswith(prefix)
    }


# --- running ---


def tokenize(models: Models) -> SdTokenize:
    """Captions -> tokens."""
    (tokenizer,) = models.tokenizers.values()
    o = Options.of(models.options)
    return SdTokenize(tokenizer, o.max_token_length, o.weighted_captions)


def tokenize_training(models: Models) -> SdTokenize:
    """Captions of a step -> tokens."""
    return replace(tokenize(models), padded=not Options.of(models.options).no_token_padding)


def encode(models: Models) -> SdEncode:
    """Tokens -> cond."""
    (name,) = models.encoders
    return SdEncode(name, Options.of(models.options).clip_skip or 1)


def process(models: Models, noise: NoiseConfig, loss: LossConfig) -> NoiseProcess:
    """DDPM with what the model predicts."""
    return DDPM.of("v" if UnetOptions.of(models.options).v_parameterization else "eps", noise, loss)


def predict(net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Noise or velocity."""
    prediction: Tensor = net(x, t, cond["hidden"])
    return prediction


def dialects(models: Models) -> Mapping[str, Dialect]:
    """Adapter names: kohya's and PEFT's are built on diffusers' names, ComfyUI's on the single file's."""
    keys = {"denoiser": unet_keys(models.denoiser.state_dict())}
    text = next(iter(models.encoders), "clip_l")
    kohya = {"denoiser": "lora_unet_", text: "lora_te_"}
    comfy = {"denoiser": "diffusion_model.", text: f"text_encoders.{text}.transformer."}
    peft = {"denoiser": "unet.", text: "text_encoder."}
    return usual(kohya, comfy, peft, keys) | {"kohya": Dialect(name="kohya", prefix=kohya, keys=keys, separator="_")}


def text_width(shapes: Shapes) -> int:
    """Channels of the text states that a U-Net with tensors of these shapes attends to."""
    return next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))


FAMILY = Family(
    name="sd",
    title="Stable Diffusion 1.x or 2.x",
    components=COMPONENTS,
    optional=frozenset({"clip_l", "clip_h", "vae"}),
    passthrough_keys=PASSTHROUGH,
    complete=complete,
    tokenizer_specs={
        "clip_l": TokenizerSpec(folder="tokenizer", make=clip_tokenizer),
        # 2.x was trained with captions padded by the token 0, which is "!".
        "clip_h": TokenizerSpec(folder="tokenizer", make=partial(clip_tokenizer, pad="!")),
    },
    new_folder=new_folder,
    adjust_single_file=adjust_single_file,
    tokenize=tokenize,
    tokenize_training=tokenize_training,
    encode=encode,
    latents=LATENTS,
    outputs=lambda models: OUTPUTS,
    process=process,
    caption=lambda shapes: {"hidden": (77, text_width(shapes))},
    predict=predict,
    blocks=blocks,
    dialects=dialects,
    targets={
        "denoiser": TARGETS,
        "clip_l": CLIP_TARGETS,
        "clip_h": CLIP_TARGETS,
    },
    target_layer=target_layer,
    block_weights=SD,
    readers=readers,
    encoder_lr_order=("clip_l", "clip_h"),
    control=CONTROL,
)
