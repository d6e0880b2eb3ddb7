"""Headers of real files, and what is said of them: helpers for the `HEADERS` of a family's `tests/tinies/NAME.py`."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

from sfumato import families

Table = dict[str, tuple[int, ...]]


def table(name: str) -> Table:
    """{tensor name: shape} of a real file; `tests/key_table.py` makes the tables."""
    path = Path(__file__).parents[1] / "fixtures" / "keys" / f"{name}.json.gz"
    return {key: tuple(shape) for key, shape in json.loads(gzip.decompress(path.read_bytes())).items()}


def under(prefix: str, tensors: Table) -> Table:
    return {prefix + name: shape for name, shape in tensors.items()}


def below(prefix: str, tensors: Table) -> Table:
    return {name[len(prefix) :]: shape for name, shape in tensors.items() if name.startswith(prefix)}


def only(prefix: str, tensors: Table) -> Table:
    """With the prefix left on."""
    return under(prefix, below(prefix, tensors))


NET, FIRST, TE = "model.diffusion_model.", "first_stage_model.", "text_encoders."
T5 = "encoder.block.0.layer.0.SelfAttention.q"


def sd(version: int) -> Table:
    return table(f"sd{version}.single_file")


def transformer(name: str) -> Table:
    return table(f"{name}.transformer")


def text(*names: str) -> Table:
    """Text encoders as bundles hold them."""
    files = {"clip_l": "clip_l.hf", "clip_g": "clip_g.hf", "t5xxl": "t5xxl.hf"}
    return {k: shape for name in names for k, shape in under(f"{TE}{name}.transformer.", table(files[name])).items()}


def sd3(name: str, *encoders: str) -> Table:
    """As Stability publishes it: with the VAE, and with or without the text encoders."""
    return under(NET, transformer(name)) | under(FIRST, table("sd3.vae")) | text(*encoders)


def comfy(name: str) -> Table:
    """FLUX and Chroma as ComfyUI saves a checkpoint."""
    return under(NET, transformer(name)) | under("vae.", table("flux.vae")) | text("clip_l", "t5xxl")


def foreign(family: str, native: Table) -> Table:
    """The denoiser's tensors as a diffusers folder names them; the names are proven against diffusers' classes elsewhere."""
    part = next(part for part in families.family(family).components if part.name == "denoiser")
    found = part.diffusers(native).write({name: torch.empty(shape, device="meta") for name, shape in native.items()})
    return {name: tuple(t.shape) for name, t in found.items()}


def lora(prefix: str, weights: Table, only: str = "block") -> Table:
    """An adapter of rank 4 for every matrix whose name the pattern `only` is found in, as ComfyUI and PEFT name it."""
    made: Table = {}
    for name, shape in weights.items():
        if name.endswith(".weight") and len(shape) == 2 and re.search(only, name):
            path = prefix + name.removesuffix(".weight")
            made |= {f"{path}.lora_A.weight": (4, shape[1]), f"{path}.lora_B.weight": (shape[0], 4)}
    assert made, f"no matrix has a name with {only!r} in it"
    return made


def scaled(tensors: Table, mark: str = "scale_weight") -> Table:
    """Weights in fewer bits with a scale beside each."""
    return tensors | {name.removesuffix("weight") + mark: () for name, shape in tensors.items() if len(shape) == 2}


def nf4(tensors: Table) -> Table:
    """As bitsandbytes keeps matrices in 4 bits: two numbers a byte, and what is needed to unpack them."""
    out: Table = {}
    for name, shape in tensors.items():
        if len(shape) != 2:
            out[name] = shape
            continue
        count = shape[0] * shape[1]
        out |= {name: (count // 2, 1), f"{name}.absmax": (count // 64,), f"{name}.quant_map": (16,)}
        out[f"{name}.quant_state.bitsandbytes__nf4"] = (90,)
    return out


def ip_adapter() -> Table:
    """ip-adapter_sd15.safetensors: the image's projection, and keys and values for it in each cross attention."""
    made: Table = {"image_proj.proj.weight": (3072, 1024), "image_proj.proj.bias": (3072,)}
    made |= {f"image_proj.norm.{leaf}": (768,) for leaf in ("weight", "bias")}
    widths = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280)
    return made | {
        f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight": (width, 768) for i, width in enumerate(widths) for kind in "kv"
    }


def esrgan(*, old: bool) -> Table:
    """RealESRGAN_x4plus (params_ema) or 4x-UltraSharp (its older names): convolutions in residual dense blocks."""
    start = "model.1.sub.{}.RDB{}.conv{}.0" if old else "params_ema.body.{}.rdb{}.conv{}"
    made: Table = {("model.0" if old else "params_ema.conv_first") + ".weight": (64, 3, 3, 3)}
    for block in range(23):
        for dense in (1, 2, 3):
            for conv in (1, 2, 3, 4, 5):
                name = start.format(block, dense, conv)
                made[f"{name}.weight"] = (32 if conv < 5 else 64, 32 * conv + 32, 3, 3)
                made[f"{name}.bias"] = (32 if conv < 5 else 64,)
    return made


def clip_vision(width: int = 1280, layers: int = 32, *, openclip: bool = False) -> Table:
    """CLIP-ViT-H-14's image encoder, as IP-Adapters come with; in OpenCLIP's names as open_clip_pytorch_model."""
    if openclip:
        block = {
            "attn.in_proj_weight": (3 * width, width),
            "attn.out_proj.weight": (width, width),
            "ln_1.weight": (width,),
        }
        return under("visual.", {f"transformer.resblocks.{i}.{n}": s for i in range(layers) for n, s in block.items()})
    made: Table = {"embeddings.class_embedding": (width,), "embeddings.patch_embedding.weight": (width, 3, 14, 14)}
    for i in range(layers):
        made |= {f"encoder.layers.{i}.self_attn.{n}_proj.weight": (width, width) for n in ("q", "k", "v", "out")}
        made |= {
            f"encoder.layers.{i}.mlp.fc1.weight": (4 * width, width),
            f"encoder.layers.{i}.layer_norm1.weight": (width,),
        }
    return under("vision_model.", made) | {"visual_projection.weight": (1024, width)}


def without(pattern: str, tensors: Table) -> Table:
    return {name: shape for name, shape in tensors.items() if not re.fullmatch(pattern, name)}


WHOLE = "denoiser, text_encoder, vae"
NO_TEXT = "holds no text_encoder"
ADAPTER, VAE, ENCODER, CONTROL = "is an adapter", "is a VAE", "is a text encoder", "is a ControlNet"
SMALL, LATER, UNKNOWN = "its weights are quantised", "which is not supported yet", "no model that sfumato knows"
OTHER_ADAPTER, OTHER_VAE, LANGUAGE = (
    "for a model that its names do not tell",
    "is a VAE of a model that is not",
    "is a language model",
)


Headers = dict[str, tuple[Callable[[], Table], str, str]]
"""What a file is: its tensors; what it is known as ("family kind variant", a pattern; empty: no family knows it); and what
is said when it is given as the base model: the parts that are found, or the refusal."""
Folders = dict[str, tuple[Callable[[], Table], str]]
"""The denoisers of diffusers folders: the tensors, and what the folder is known as."""
