"""The record of Stable Diffusion 1.x and 2.x: how they are loaded, run, adapted and saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.config import NoiseConfig
from sfumato.data.batch import Batch, Cond
from sfumato.errors import UserError
from sfumato.families.autoencoders import load_kl
from sfumato.families.base import Family, Models
from sfumato.families.detect import detect_file
from sfumato.families.encoders import ClipText, clip_text
from sfumato.families.fill import fill, shapes
from sfumato.families.sd import checkpoint, folder
from sfumato.families.sd.facts import Options
from sfumato.families.sd.names import unet_keys
from sfumato.families.sd.net import UNet
from sfumato.families.sd.source import Source, read_vae, unchanged
from sfumato.families.sd.strategies import LATENTS, OUTPUTS, SdEncode, SdTokenize
from sfumato.families.sources import local
from sfumato.families.tokenizers import clip_tokenizer, is_stock
from sfumato.formats import files
from sfumato.formats.dialect import Dialect
from sfumato.tensors.noise import DDPM, Process

NAME = "pretrained_model_name_or_path"


def load(
    path: str,
    options: Options,
    *,
    vae: str | None = None,
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Models:
    """See `families.base.Load`. The VAE stays in the format of its file; it is None if neither the checkpoint nor `vae` has one."""
    where = local(path, NAME)
    detect_file(where, NAME)
    source = folder.read(where) if where.is_dir() else checkpoint.read(where)
    denoiser = fill(UNet.of(_trainable(shapes(source.unet), where)), source.unet, f"{where} (U-Net)")
    if vae is not None:
        tensors, scale = read_vae(vae)
        source = replace(source, vae=tensors, vae_scale=scale)
    options = complete(options, source)
    encoder = clip_text(source.text, source.activation, f"{where} (text encoder)")
    tokens = _tokenizer(tokenizer, where, v2=source.v2)
    _check_vocabulary(tokens, encoder)
    return Models(
        family=FAMILY,
        options=options,
        denoiser=denoiser.to(device, dtype),
        encoders={source.encoder: encoder.to(device, dtype)},
        tokenizers={source.encoder: tokens},
        vae=None if source.vae is None else load_kl(source.vae, source.vae_scale, vae or str(where)).to(device),
        source=where,
        layout="diffusers" if where.is_dir() else "single_file",
        extras={"source": source},
    )


def complete(options: Options, source: Source) -> Options:
    """The options with what the source says filled in. Errors: `UserError` if they name the other version."""
    if options.v2 is not None and options.v2 != source.v2:
        is_, not_ = ("2.x", "1.x") if source.v2 else ("1.x", "2.x")
        raise UserError(f"v2: {source.path} is Stable Diffusion {is_}, not {not_}; leave v2 out")
    return replace(options, v2=source.v2, v_parameterization=options.v_parameterization or source.prediction == "v")


def _trainable(unet: dict[str, tuple[int, ...]], where: Path) -> dict[str, tuple[int, ...]]:
    channels = unet["input_blocks.0.0.weight"][1]
    if channels != LATENTS.channels:
        raise UserError(
            f"{NAME}: the U-Net of {where} takes {channels} channels (an inpainting, depth or editing model), which is not supported yet"
        )
    return unet


def _tokenizer(given: str | None, where: Path, *, v2: bool) -> Any:
    """The tokenizer given, else the one in the folder or beside the file, else CLIP's own."""
    if given is not None:
        path = local(given, "tokenizer")
        return clip_tokenizer(path / "tokenizer" if (path / "tokenizer").is_dir() else path)
    beside = (where if where.is_dir() else where.parent) / "tokenizer"
    if beside.is_dir():
        return clip_tokenizer(beside)
    # 2.x was trained with captions padded by the token 0, which is "!".
    return clip_tokenizer(pad="!") if v2 else clip_tokenizer()


def _check_vocabulary(tokenizer: Any, encoder: ClipText) -> None:
    rows = encoder.config.vocab_size
    if len(tokenizer) > rows:
        raise UserError(f"tokenizer: it knows {len(tokenizer)} tokens, the text encoder only {rows}; give this model's own with tokenizer")


def save(
    models: Models,
    path: Path,
    *,
    layout: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    state: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """See `families.base.Save`. A part that is as it was read is written in its first number format, not as it was run in."""
    source: Source = models.extras["source"]
    name, encoder = next(iter(models.encoders.items()))
    nets = {"denoiser": (models.denoiser, source.unet), name: (encoder, source.text)}
    if models.vae is not None and source.vae is not None:
        nets["vae"] = (models.vae, source.vae)
    parts = {part: _values(net, given, (state or {}).get(part, {}), dtype) for part, (net, given) in nets.items()}
    for part, tensors in parts.items():
        files.check_finite(tensors, f"{path.name} ({part})")
    tokenizer, v = models.tokenizers[name], models.options.v_parameterization
    if layout == "diffusers":
        folder.write(
            path,
            unet=parts["denoiser"],
            text=parts[name],
            vae=parts.get("vae"),
            encoder=cast(ClipText, encoder),
            vae_net=models.vae,
            tokenizer=tokenizer,
            scheduler=DDPM(prediction="v" if v else "eps").scheduler_config(),
            metadata=metadata,
            sample_size=96 if models.options.v2 and v else 64,
        )
        return
    if not unchanged(models.denoiser.state_dict(), source.unet):
        # An average of the old U-Net beside the new one would be taken for the new one's by programs that prefer it.
        source = replace(source, kept={k: t for k, t in source.kept.items() if not k.startswith("model_ema.")})
    _put_beside(tokenizer, path.parent / "tokenizer")
    files.save(path, checkpoint.spell(source, parts["denoiser"], parts[name], parts.get("vae")), metadata)


def _values(net: nn.Module, given: Mapping[str, Tensor], instead: Mapping[str, Tensor], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    own = {**net.state_dict(), **instead}
    if unchanged(own, given):
        own = dict(given)
    return own if dtype is None else {name: t.to(dtype) for name, t in own.items()}


def _put_beside(tokenizer: Any, beside: Path) -> None:
    """A vocabulary of its own goes with the file, or it could not be used; CLIP's comes with every program."""
    if is_stock(tokenizer):
        return
    if not beside.exists():
        tokenizer.save_pretrained(beside)
    elif clip_tokenizer(beside).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{beside}: another model's tokenizer stands where this model's must; choose another output_dir")


def tokenize(models: Models) -> SdTokenize:
    """Captions -> tokens, as the options say."""
    (tokenizer,) = models.tokenizers.values()
    return SdTokenize(tokenizer, models.options.max_token_length, models.options.weighted_captions)


def encode(models: Models) -> SdEncode:
    """Tokens -> cond, as the options say."""
    ((name, encoder),) = models.encoders.items()
    skip, layers = models.options.clip_skip or 1, len(cast(ClipText, encoder).layers)
    if not 1 <= skip <= layers:
        raise UserError(f"clip_skip: {skip}; the text encoder has {layers} layers, so 1 to {layers} was expected")
    return SdEncode(name, skip)


def process(models: Models, noise: NoiseConfig, loss: Any) -> Process:
    """DDPM with what the model predicts."""
    return DDPM.of("v" if models.options.v_parameterization else "eps", noise, loss)


def predict(net: nn.Module, x: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
    """What the U-Net says."""
    said: Tensor = net(x, t, cond["hidden"])
    return said


def scale(vae: nn.Module, latents: Tensor) -> Tensor:
    """Raw latents -> those of the U-Net."""
    return latents * float(cast(Any, vae).config.scaling_factor)


def unscale(vae: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `scale`."""
    return latents / float(cast(Any, vae).config.scaling_factor)


def blocks(net: nn.Module) -> Sequence[nn.Module]:
    """The U-Net's blocks; the first, a single convolution, is left out."""
    unet = cast(UNet, net)
    return [*list(unet.input_blocks)[1:], unet.middle_block, *unet.output_blocks]


def encoder_blocks(net: nn.Module) -> Sequence[nn.Module]:
    """The text encoder's layers."""
    return list(cast(ClipText, net).layers)


PEFT_LEAVES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def dialects(models: Models) -> Mapping[str, Dialect]:
    """Adapter names: kohya's and PEFT's are built on diffusers' names, ComfyUI's on the single file's."""
    keys = {"denoiser": unet_keys(models.denoiser.state_dict())}
    text = next(iter(models.encoders))
    kohya = Dialect(name="kohya", prefix={"denoiser": "lora_unet_", text: "lora_te_"}, keys=keys, separator="_")
    comfy = Dialect(name="comfy", prefix={"denoiser": "diffusion_model.", text: f"text_encoders.{text}.transformer."}, leaves=PEFT_LEAVES)
    peft = Dialect(name="peft", prefix={"denoiser": "unet.", text: "text_encoder."}, keys=keys, leaves=PEFT_LEAVES, fold_alpha=True)
    return {"kohya": kohya, "comfy": comfy, "peft": peft}


_CLIP_TARGETS = {"linear": ("*.self_attn.*_proj", "*.mlp.fc?")}

FAMILY = Family(
    name="sd",
    load=load,
    save=save,
    tokenize=tokenize,
    encode=encode,
    latents=LATENTS,
    outputs=OUTPUTS,
    process=process,
    predict=predict,
    scale=scale,
    unscale=unscale,
    blocks=blocks,
    encoder_blocks=encoder_blocks,
    dialects=dialects,
    targets={
        "denoiser": {
            "linear": ("*.proj_in", "*.proj_out", "*.transformer_blocks.*"),
            "conv": ("*.in_layers.2", "*.emb_layers.1", "*.out_layers.3", "*.skip_connection", "*.op", "*.conv"),
        },
        "clip_l": _CLIP_TARGETS,
        "clip_h": _CLIP_TARGETS,
    },
    encoder_lr_order=("clip_l", "clip_h"),
)
