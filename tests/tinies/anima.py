"""Tiny Anima models with random weights, from diffusers' and transformers' classes, and the headers of the real files.

Sizes are the real ones' in small and differ from one another; names and layout are the real ones'. They are in eval mode and
shared between tests: not to be changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import (
    AnimaAutoBlocks,
    AnimaTextConditioner,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from torch import Tensor
from torch.nn import functional

from sfumato.families.anima.facts import NET, QWEN3, VAE
from sfumato.families.anima.names import anima_keys
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.sampling.prompts import Prompt
from tinies import encoders, headers, llms, vaes
from tinies.cases import Case, Files
from tinies.encoders import randomised

if not hasattr(transformer_cosmos, "transforms"):
    # torchvision, which diffusers asks for the one thing that it does with the padding mask, need not be there.
    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, interpolation: functional.interpolate(mask, size)),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )

TEXT_WIDTH = 48
"""Of what the text adapter makes."""


@cache
def transformer() -> Any:
    made = randomised(
        21,
        lambda: CosmosTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=3,
            mlp_ratio=2.0,
            text_embed_dim=TEXT_WIDTH,
            adaln_lora_dim=16,
            max_size=(128, 240, 240),
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        ),
    )
    for block in made.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q, block.attn2.norm_k):
            norm.eps = 1e-6  # as in NVIDIA's net, by which the models were trained; diffusers has 1e-5
    return made


@cache
def conditioner() -> Any:
    return randomised(
        22,
        lambda: AnimaTextConditioner(
            source_dim=llms.QWEN3_WIDTH,
            target_dim=TEXT_WIDTH,
            model_dim=TEXT_WIDTH,
            num_layers=2,
            num_attention_heads=3,
            mlp_ratio=2.0,
            target_vocab_size=len(encoders.t5_tokenizer()) + 5,
        ),
    )


class AnimaModularPipeline(diffusers.AnimaModularPipeline):
    """diffusers' modular pipeline with its components loaded, as others are."""

    @classmethod
    def of(cls, **parts: Any) -> AnimaModularPipeline:
        made = cls(blocks=AnimaAutoBlocks())
        made.update_components(**parts)
        made.set_progress_bar_config(disable=True)
        return made

    @classmethod
    def from_pretrained(cls, path: Any, **absent: None) -> AnimaModularPipeline:
        made = diffusers.AnimaModularPipeline.from_pretrained(str(path))
        made.load_components()
        return cls.of(**{name: getattr(made, name) for name in COMPONENTS})

    def save_pretrained(self, path: Any) -> None:
        super().save_pretrained(str(path), overwrite_modular_index=True)


COMPONENTS = ("text_encoder", "tokenizer", "t5_tokenizer", "text_conditioner", "transformer", "vae", "scheduler")


@cache
def pipeline() -> Any:
    return AnimaModularPipeline.of(
        text_encoder=llms.qwen3(),
        tokenizer=llms.qwen_tokenizer(),
        t5_tokenizer=encoders.t5_tokenizer(),
        text_conditioner=conditioner(),
        transformer=transformer(),
        vae=vaes.qwen_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def foreign() -> dict[str, Tensor]:
    """The denoiser's tensors as diffusers has them in two folders."""
    return {**transformer().state_dict(), **add_prefix(conditioner().state_dict(), "text_conditioner.")}


def tensors() -> dict[str, Tensor]:
    """The denoiser's tensors as the official file has them, but for the prefix."""
    return {name: t.clone() for name, t in anima_keys().to_native(foreign()).items()}


def write(folder: Path) -> Files:
    """As published: the denoiser, Qwen3 and the VAE in a file each."""
    llms.qwen_tokenizer().save_pretrained(folder / "tokenizer")
    encoders.t5_tokenizer().save_pretrained(folder / "t5_tokenizer")
    model, qwen3, vae = (folder / f"{name}.safetensors" for name in ("anima", "qwen_3_06b", "qwen_image_vae"))
    # The published nets compute these, and keep them in their files.
    positions = {"dim_spatial_range": torch.rand(5), "dim_temporal_range": torch.rand(6), "seq": torch.arange(256.0)}
    save(model, add_prefix({**tensors(), **add_prefix(positions, "pos_embedder.")}, NET), {})
    save(qwen3, add_prefix(llms.qwen3().state_dict(), "model."), {})
    save(vae, vaes.qwen_vae_original(), {})
    return Files(model=model, options={"qwen3": str(qwen3)}, vae=str(vae))


def encoded(pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    """Qwen3's states, and T5's tokens."""
    said = AnimaTextEncoderStep.encode_prompt(
        pipe, list(captions), prepare_unconditional_embeds=False, max_sequence_length=4096
    )
    return {"qwen3": said["qwen_prompt_embeds"], "t5_ids": said["t5_input_ids"]}


def drawn(pipe: Any, prompt: Prompt, noise: Tensor) -> Tensor:
    pipe.guider.guidance_scale = prompt.scale
    latents: Tensor = pipe(
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        height=prompt.height,
        width=prompt.width,
        num_inference_steps=prompt.sample_steps,
        latents=noise[:, :, None],
        output="latents",
    )
    return latents[0, :, 0]


CASES = (
    Case(
        family="anima",
        variant="preview",
        pipeline=pipeline,
        write=write,
        encoded=encoded,
        drawn=drawn,
    ),
)

# --- headers of the real files; see `tinies/headers.py` ---


def deeper(blocks: int) -> headers.Table:
    """A community file: its first block so many times."""
    table = headers.transformer("anima")
    block = headers.below("blocks.0.", table)
    return headers.without(r"blocks\..*", table) | {
        f"blocks.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()
    }


def bundle(blocks: int = 28) -> headers.Table:
    """As ComfyUI saves a checkpoint."""
    return (
        headers.under(headers.NET, deeper(blocks))
        | headers.under(f"{QWEN3}model.", headers.table("qwen3_06b.hf"))
        | headers.under(VAE, wan_vae())
    )


def wan_vae() -> headers.Table:
    """The VAE in its original names, which are ComfyUI's file's."""
    from sfumato.models.qwen_vae import qwen_vae_keys

    table = headers.table("qwen_image.vae.diffusers")
    meta = {name: torch.empty(shape, device="meta") for name, shape in table.items()}
    return {name: tuple(t.shape) for name, t in qwen_vae_keys(meta).to_foreign(meta).items()}


def cosmos(native: headers.Table | None = None) -> headers.Table:
    """Cosmos-Predict2: without the text adapter."""
    return headers.without(r"llm_adapter\..*", native or headers.transformer("anima"))


def plain() -> headers.Table:
    """The real net's tensors, without what no net has."""
    return headers.without(r"pos_embedder\..*", headers.transformer("anima"))


USUAL = {"28": bundle, "36": partial(bundle, 36), "40": partial(bundle, 40)}
COMFYUI = {"28": "anima"}

NO_ADAPTER = "is Cosmos-Predict2, which is Anima's transformer without the text adapter"

HEADERS: headers.Headers = {
    "anima": (
        lambda: headers.under(NET, headers.transformer("anima")),
        "anima checkpoint ",
        "denoiser",
    ),
    "anima bare": (lambda: headers.transformer("anima"), "anima checkpoint ", "denoiser"),
    "anima without positions": (lambda: headers.under(NET, plain()), "anima checkpoint ", "denoiser"),
    "anima with prefix": (
        lambda: headers.under(headers.NET, headers.transformer("anima")),
        "anima checkpoint ",
        "denoiser",
    ),
    "anima bundle": (bundle, "anima checkpoint ", headers.WHOLE),
    "anima of diffusers": (lambda: headers.foreign("anima", plain()), "anima checkpoint ", "denoiser"),
    "anima 36": (lambda: headers.under(NET, deeper(36)), "anima checkpoint ", "denoiser"),
    "anima 40": (lambda: headers.under(headers.NET, deeper(40)), "anima checkpoint ", "denoiser"),
    "anima in scaled fp8": (
        lambda: headers.scaled(headers.under(NET, plain())) | {"net.scaled_fp8": (0,)},
        "",
        headers.SMALL,
    ),
    "anima in nf4": (lambda: headers.nf4(headers.under(NET, plain())), "", headers.SMALL),
    "cosmos": (lambda: headers.under(NET, cosmos()), "anima checkpoint ", NO_ADAPTER),
    "cosmos of diffusers": (
        lambda: headers.without(r"text_conditioner\..*", headers.foreign("anima", plain())),
        "anima checkpoint ",
        NO_ADAPTER,
    ),
    "cosmos of videos": (
        lambda: headers.under(NET, cosmos() | {"x_embedder.proj.1.weight": (2048, 72)}),
        "anima checkpoint ",
        "takes 72 channels a patch, not 68 (one of videos)",
    ),
    "anima lora": (lambda: headers.table("adapter.anima.lora"), "anima adapter ", headers.ADAPTER),
    "anima lokr": (lambda: headers.table("adapter.anima.lokr"), "anima adapter ", headers.ADAPTER),
    "anima lora of comfy": (lambda: headers.lora("diffusion_model.", plain()), "anima adapter ", headers.ADAPTER),
    "anima lora of the text adapter": (
        lambda: headers.lora("diffusion_model.", plain(), r"llm_adapter\.blocks"),
        "anima adapter ",
        headers.ADAPTER,
    ),
    "anima lora of modulations": (
        lambda: headers.lora("diffusion_model.", plain(), "adaln_modulation"),
        "anima adapter ",
        headers.ADAPTER,
    ),
    "anima lora of peft": (
        lambda: headers.lora("transformer.", headers.foreign("anima", plain()), r"^transformer_blocks.*(attn|ff)"),
        "anima adapter ",
        headers.ADAPTER,
    ),
    "anima lora of the text adapter of peft": (
        lambda: headers.lora("", headers.foreign("anima", plain()), r"^text_conditioner\.blocks"),
        "anima adapter ",
        headers.ADAPTER,
    ),
    "cosmos 14b lora": (
        lambda: {
            n: tuple(5120 if i == 2048 else i for i in s) for n, s in headers.lora("", plain(), "^blocks").items()
        },
        "",
        headers.OTHER_ADAPTER,
    ),
    "anima vae": (lambda: headers.table("qwen_image.vae.diffusers"), "anima vae ", headers.VAE),
    "anima vae of wan": (wan_vae, "anima vae ", headers.VAE),
    "anima vae with prefix": (lambda: headers.under(VAE, wan_vae()), "anima vae ", headers.VAE),
    "anima qwen3": (lambda: headers.table("qwen3_06b.hf"), "anima text_encoder ", headers.ENCODER),
    "anima qwen3 of comfy": (
        lambda: headers.under("model.", headers.table("qwen3_06b.hf")),
        "anima text_encoder ",
        headers.ENCODER,
    ),
}

FOLDERS: headers.Folders = {
    "anima": (lambda: headers.foreign("anima", plain()), "anima checkpoint "),
    "anima 40": (
        lambda: headers.foreign("anima", headers.without(r"pos_embedder\..*", deeper(40))),
        "anima checkpoint ",
    ),
}
