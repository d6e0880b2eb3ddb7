"""diffusers folders of Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import UserError
from sfumato.families import sources
from sfumato.families.autoencoders import SD_SCALE
from sfumato.families.encoders import CLIP_BARE, CLIP_HF, ClipText, heads
from sfumato.families.sd.names import Layout, unet_keys
from sfumato.families.sd.net import CONV_HEADS, LINEAR_HEAD_WIDTH
from sfumato.families.sd.source import Source, read_vae
from sfumato.formats import files

UNET_FACTS: dict[str, Any] = {
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "resnet_time_scale_shift": "default",
    "transformer_layers_per_block": 1,
}
"""What a config must say, where it says anything, for the net to be the one we have."""
_MIDDLE = "mid_block.attentions.0.proj_in.weight"
_CONV = "down_blocks.{}.resnets.0.conv1.weight"


def read(path: Path) -> Source:
    """The parts of a folder. Errors: `UserError` for missing parts, and for configs that ask for another net."""
    unet = sources.weights(path / "unet")
    if _MIDDLE not in unet:
        raise UserError(f"{path / 'unet'}: lacks the tensor {_MIDDLE!r}; the file is incomplete or of another kind")
    _check_unet(path / "unet" / "config.json", unet)
    text = {name: t for name, t in sources.weights(path / "text_encoder").items() if not name.endswith("position_ids")}
    prefixed = any(name.startswith("text_model.") for name in text)
    vae, scale = read_vae(str(path / "vae")) if (path / "vae").is_dir() else (None, SD_SCALE)
    scheduler = path / "scheduler" / "scheduler_config.json"
    said = sources.read_json(scheduler).get("prediction_type") if scheduler.is_file() else None
    return Source(
        path=path,
        unet=unet_keys(unet).to_native(unet),
        text=(CLIP_HF if prefixed else CLIP_BARE).to_native(text),
        vae=vae,
        vae_scale=scale,
        activation=_activation(path / "text_encoder" / "config.json"),
        text_names="open_clip" if unet[_MIDDLE].ndim == 2 else "hf",
        prediction={"v_prediction": "v", "epsilon": "eps"}.get(str(said)),  # type: ignore[arg-type]
    )


def _check_unet(path: Path, unet: Mapping[str, Tensor]) -> None:
    config = sources.read_json(path)
    wrong = [
        f"{path}: {key} is {config[key]!r}; only {value!r} is supported"
        for key, value in UNET_FACTS.items()
        if config.get(key, value) != value
    ]
    widths = _widths(unet)
    said = config.get("num_attention_heads") or config.get("attention_head_dim", CONV_HEADS)
    # diffusers calls the number of heads attention_head_dim here.
    said = list(said) if isinstance(said, list | tuple) else [said] * len(widths)
    expected = _heads(unet, widths)
    if said != expected:
        wrong.append(f"{path}: attention heads {said}; for these widths only {expected} is supported")
    if wrong:
        raise UserError(*wrong)


def _activation(path: Path) -> str:
    config = sources.read_json(path)
    expected = heads(int(config.get("hidden_size", 512)))  # transformers leaves its own defaults out of the file
    if config.get("num_attention_heads", expected) != expected:
        raise UserError(f"{path}: {config['num_attention_heads']} attention heads; for this width only {expected} is supported")
    return str(config.get("hidden_act", "quick_gelu"))


def _widths(unet: Mapping[str, Tensor]) -> list[int]:
    """Channels of each level, from a U-Net in diffusers' names."""
    return [unet[_CONV.format(level)].shape[0] for level in range(len(Layout.of(unet).attention))]


def _heads(unet: Mapping[str, Tensor], widths: list[int]) -> list[int]:
    linear = unet[_MIDDLE].ndim == 2
    return [width // LINEAR_HEAD_WIDTH if linear else CONV_HEADS for width in widths]


# --- saving ---


def write(
    path: Path,
    *,
    unet: Mapping[str, Tensor],
    text: Mapping[str, Tensor],
    vae: Mapping[str, Tensor] | None,
    encoder: ClipText,
    vae_net: Any,
    tokenizer: Any,
    scheduler: Mapping[str, Any],
    metadata: Mapping[str, str],
    sample_size: int,
) -> None:
    """A folder that `StableDiffusionPipeline.from_pretrained` reads; it appears whole or not at all.

    `unet` in LDM names, `text` in those of `ClipText`, `vae` in those of AutoencoderKL. A source folder's
    safety checker is not copied. `sample_size`: side of the latents that the model is used at by default.
    """
    foreign = unet_keys(unet).to_foreign(unet)
    with _aside(path) as folder:
        _component(folder / "unet", "diffusion_pytorch_model", foreign, unet_config(foreign, sample_size), metadata)
        _component(folder / "text_encoder", "model", CLIP_HF.to_foreign(text), _text_config(encoder), metadata)
        if vae is not None:
            config = {"_class_name": "AutoencoderKL", **{k: v for k, v in vae_net.config.items() if not k.startswith("_")}}
            _component(folder / "vae", "diffusion_pytorch_model", vae, config, metadata)
        tokenizer.save_pretrained(folder / "tokenizer")
        _json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **scheduler})
        _json(folder / "model_index.json", _index(with_vae=vae is not None))


def unet_config(unet: Mapping[str, Tensor], sample_size: int) -> dict[str, Any]:
    """The config of diffusers' UNet2DConditionModel for a net with these tensors, in diffusers' names."""
    widths, layout = _widths(unet), Layout.of(unet)
    linear = unet[_MIDDLE].ndim == 2
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in layout.attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(layout.attention)]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet["conv_in.weight"].shape[1],
        "out_channels": unet["conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layout.layers,
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": up,
        "cross_attention_dim": unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": _heads(unet, widths) if linear else CONV_HEADS,
        "use_linear_projection": linear,
        "sample_size": sample_size,
        **UNET_FACTS,
    }


def _text_config(encoder: ClipText) -> dict[str, Any]:
    return {**encoder.config.to_diff_dict(), "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}


def _index(*, with_vae: bool) -> dict[str, Any]:
    absent = [None, None]
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": absent,
        "image_encoder": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"] if with_vae else absent,
    }


def _component(folder: Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    _json(folder / "config.json", config)
    # Readers of such folders ask for the mark "pt".
    files.save(folder / f"{name}.safetensors", tensors, {**metadata, "format": "pt"})


def _json(path: Path, content: Mapping[str, Any]) -> None:
    files.write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well."""
    temp, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    for left in (temp, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield temp
        if path.exists():
            path.rename(old)
        temp.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (temp, old):
            shutil.rmtree(left, ignore_errors=True)
