"""Stable Diffusion XL in small.

Sizes are the real ones' in small; names and layout are the real ones'. What is cached is in eval mode and shared between
tests: not to be changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from sfumato.families.sdxl.names import CLIP_G, CLIP_L, VAE, unet_keys
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.models.autoencoders import vae_keys
from sfumato.models.detection import PREFIX
from sfumato.models.encoders.clip import OPEN_CLIP
from sfumato.sampling.prompts import Prompt
from sfumato.sampling.sample import scheduler_for
from sfumato.tensors.noise import DDPM
from tinies import encoders, headers
from tinies.cases import Case, Files
from tinies.encoders import G_WIDTH, L_WIDTH, clip_config, randomised

CONTEXT = L_WIDTH + G_WIDTH
"""Width of the text states, those of both encoders side by side."""
SIZE_WIDTH = 256
"""Numbers that each of the embedded sizes takes in the label."""


@cache
def unet(*, refiner: bool = False) -> Any:
    """The base model's U-Net, with six sizes; or one laid out as the refiner's, with five and a level more."""
    # Of 32 channels each would be a group of its own to the norms, which would hide what the label and the time add.
    shape: dict[str, Any] = {
        "block_out_channels": (64, 64, 128),
        "attention_head_dim": (1, 1, 2),
        "transformer_layers_per_block": [1, 1, 2],
    }
    kinds, context, sizes = ("", "CrossAttn", "CrossAttn"), CONTEXT, 6
    if refiner:
        shape = {"block_out_channels": (64, 64, 64, 64), "attention_head_dim": 1, "transformer_layers_per_block": 2}
        kinds, context, sizes = ("", "CrossAttn", "CrossAttn", ""), G_WIDTH, 5
    return randomised(
        6,
        lambda: UNet2DConditionModel(
            **shape,
            sample_size=8,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            use_linear_projection=True,
            cross_attention_dim=context,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_WIDTH,
            projection_class_embeddings_input_dim=G_WIDTH + sizes * SIZE_WIDTH,
        ),
    )


@cache
def clip_l() -> Any:
    """CLIP-L with as many layers as the real one, the last of which is not used."""
    return randomised(7, lambda: CLIPTextModel(clip_config(L_WIDTH, 12, "quick_gelu")))


@cache
def vae(seed: int = 8) -> Any:
    """The VAE, with XL's scaling."""
    shape = {
        "block_out_channels": (32,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
    }
    return randomised(seed, lambda: AutoencoderKL(**shape, scaling_factor=0.13025))


def pipeline(prediction: str = "epsilon") -> StableDiffusionXLPipeline:
    """diffusers' pipeline of the parts."""
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_l(),
        text_encoder_2=encoders.clip_g(),
        tokenizer=encoders.clip_tokenizer(),
        tokenizer_2=encoders.clip_tokenizer(g=True),
        unet=unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type=prediction,
        ),
        add_watermarker=False,
    )


def single_file(*, bundled: bool = True) -> dict[str, Tensor]:
    """All tensors of a single file, those that belong to no net as well. `bundled`: the VAE too."""
    denoiser, first, second = unet().state_dict(), tiny.text_states(clip_l()), tiny.text_states(encoders.clip_g())
    nets = add_prefix(unet_keys(denoiser).to_native(denoiser), PREFIX)
    nets |= add_prefix(first, CLIP_L) | add_prefix(OPEN_CLIP.to_native(second), CLIP_G)
    if bundled:
        nets |= add_prefix(vae_keys(vae().state_dict()).to_foreign(vae().state_dict()), VAE)
    others = {
        "alphas_cumprod": torch.linspace(1, 0, 1000),
        f"{CLIP_L}text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{CLIP_G}logit_scale": torch.tensor(4.6),
    }
    return nets | others


def put(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    """A single file of these tensors with the tokenizers beside it."""
    save(path, tensors, metadata)
    encoders.clip_tokenizer().save_pretrained(path.parent / "tokenizer")
    encoders.clip_tokenizer(g=True).save_pretrained(path.parent / "tokenizer_2")
    return path


def write(folder: Path) -> Files:
    return Files(model=put(folder / "model.safetensors", single_file()))


def encoded(pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    hidden, _, pooled, _ = pipe.encode_prompt(list(captions), device="cpu", do_classifier_free_guidance=False)
    return {"hidden": hidden, "pooled": pooled}


def drawn(pipe: Any, prompt: Prompt, noise: Tensor) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_for(DDPM(), "euler")
    found = pipe(
        prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        height=prompt.height,
        width=prompt.width,
        num_inference_steps=prompt.sample_steps,
        guidance_scale=prompt.scale,
        latents=noise,
        output_type="latent",
    )
    latents: Tensor = found.images[0]
    return latents


CASES = (
    Case(
        family="sdxl",
        variant="base",
        pipeline=pipeline,
        write=write,
        encoded=encoded,
        drawn=drawn,
        # What stands behind the states that are used.
        unmoved=r"clip_l\.text_model\.(encoder\.layers\.11\.|final_layer_norm\.).*",
    ),
)

# --- headers of the real files; see `tinies/headers.py` ---

USUAL = {"base": lambda: headers.table("sdxl.single_file")}
"""The models that people have, for `tests/usual_models.py`: variant -> the tensors of a single file."""
COMFYUI = {"base": "sdxl"}
"""Variant -> ComfyUI's table of its adapters' keys, `fixtures/comfy.*`."""

HEADERS: headers.Headers = {
    "sdxl": (lambda: headers.table("sdxl.single_file"), "sdxl checkpoint ", headers.WHOLE),
    "sdxl unet with prefix": (
        lambda: headers.only(headers.NET, headers.table("sdxl.single_file")),
        "sdxl checkpoint ",
        headers.NO_TEXT,
    ),
    "sdxl unet bare": (lambda: headers.table("sdxl.unet"), "sdxl checkpoint ", headers.NO_TEXT),
    "sdxl unet of diffusers": (
        lambda: headers.foreign("sdxl", headers.table("sdxl.unet")),
        "sdxl checkpoint ",
        headers.NO_TEXT,
    ),
    "sdxl lora": (lambda: headers.table("adapter.sdxl.lora"), "sdxl adapter ", headers.ADAPTER),
    "sdxl locon": (lambda: headers.table("adapter.sdxl.locon"), "sdxl adapter ", headers.ADAPTER),
    "sdxl loha": (lambda: headers.table("adapter.sdxl.loha"), "sdxl adapter ", headers.ADAPTER),
    "sdxl lokr": (lambda: headers.table("adapter.sdxl.lokr"), "sdxl adapter ", headers.ADAPTER),
    "sdxl oft": (lambda: headers.table("adapter.sdxl.oft"), "sdxl adapter ", headers.ADAPTER),
    "sdxl lora of comfy": (
        lambda: headers.lora("diffusion_model.", headers.table("sdxl.unet")),
        "sdxl adapter ",
        headers.ADAPTER,
    ),
    "sdxl lora of peft": (
        lambda: headers.lora("unet.", headers.foreign("sdxl", headers.table("sdxl.unet"))),
        "sdxl adapter ",
        headers.ADAPTER,
    ),
    "sdxl lora of a text encoder": (
        lambda: {k: v for k, v in headers.table("adapter.sdxl.lora").items() if k.startswith("lora_te2_")},
        "sdxl adapter ",
        headers.ADAPTER,
    ),
    "sdxl controlnet": (lambda: headers.table("sdxl.controlnet"), "sdxl controlnet ", headers.CONTROL),
    "sdxl lllite": (lambda: headers.table("sdxl.lllite"), "sdxl controlnet ", headers.CONTROL),
    "sdxl embedding": (
        lambda: {"clip_l": (4, 768), "clip_g": (4, 1280)},
        "sdxl embedding ",
        "is a textual inversion embedding",
    ),
}

FOLDERS: headers.Folders = {
    "sdxl": (lambda: headers.foreign("sdxl", headers.table("sdxl.unet")), "sdxl checkpoint "),
}
