"""Lumina Image 2.0 in small, with random weights from diffusers' and transformers' classes: as files of its own and as one bundle.

Sizes are the real ones' in small and differ from one another; names and layout are the real ones'. It is in eval mode
and shared between tests: not to be changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor

from sfumato.families.lumina2.names import UNUSED, transformer_keys
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.models.autoencoders import vae_keys
from sfumato.models.meta_init import shapes
from sfumato.sampling.prompts import Prompt
from tinies import headers
from tinies.cases import Case, Files
from tinies.encoders import randomised, vae16
from tinies.llms import GEMMA_WIDTH as CONTEXT
from tinies.llms import gemma2, gemma_tokenizer

SYSTEM = "a photo of"
GEMMA = "text_encoders.gemma2_2b.transformer.model."


@cache
def transformer() -> Any:
    """The transformer: four heads of queries, two of keys and values."""
    return randomised(
        9,
        lambda: Lumina2Transformer2DModel(
            hidden_size=96,
            num_layers=3,
            num_refiner_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=32,
            axes_dim_rope=(8, 8, 8),
            cap_feat_dim=CONTEXT,
        ),
    )


@cache
def pipeline() -> Any:
    """diffusers' pipeline, with the shift of the published model."""
    pipe = Lumina2Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae16(),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts() -> dict[str, dict[str, Tensor]]:
    """The tensors of the files that people download, by part; the transformer's with the norm that nothing applies, as it was made."""
    foreign, latent = transformer().state_dict(), vae16().state_dict()
    net = transformer_keys(shapes(foreign)).to_native(foreign)
    return {
        "transformer": net | {UNUSED: torch.ones(96)},
        "vae": vae_keys(latent).to_foreign(latent),
        "gemma2": dict(gemma2().state_dict()),
    }


def bundle() -> dict[str, Tensor]:
    """All in one file, as ComfyUI saves it and Neta-Lumina comes."""
    prefixes = {"transformer": headers.NET, "vae": "vae.", "gemma2": GEMMA}
    held = {key: t for name, tensors in parts().items() for key, t in add_prefix(tensors, prefixes[name]).items()}
    begin = GEMMA.removesuffix("transformer.model.")
    return held | {f"{begin}logit_scale": torch.tensor(4.6), f"{begin}spiece_model": torch.arange(9, dtype=torch.uint8)}


def write(folder: Path, *, bundled: bool = False) -> Files:
    """The transformer as it is published, Gemma and the VAE in files of their own; or one file for all."""
    gemma_tokenizer().save_pretrained(folder / "tokenizer")
    model = folder / "model.safetensors"
    if bundled:
        save(model, bundle(), {})
        return Files(model=model)
    for path, tensors in zip(
        (model, folder / "ae.safetensors", folder / "gemma.safetensors"), parts().values(), strict=True
    ):
        save(path, tensors, {})
    return Files(model=model, options={"gemma2": str(folder / "gemma.safetensors")}, vae=str(folder / "ae.safetensors"))


def encoded(system: str, pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    """As many rows as the longest caption uses: the pipeline always makes 256.

    An empty caption is encoded as a negative prompt, without the system prompt. States of padding are zero here.
    """
    of_each = [_states(system, pipe, caption) for caption in captions]
    states, mask = (torch.cat(part) for part in zip(*of_each, strict=True))
    rows = int(mask.sum(1).max())
    return {"gemma2": states[:, :rows] * mask[:, :rows, None], "gemma2_mask": mask[:, :rows].bool()}


def _states(system: str | None, pipe: Any, caption: str) -> tuple[Tensor, Tensor]:
    positive, mask, negative, negative_mask = pipe.encode_prompt(
        caption, negative_prompt=caption, system_prompt=system, device="cpu"
    )
    return (positive, mask) if system and caption else (negative, negative_mask)


def drawn(system: str, pipe: Any, prompt: Prompt, noise: Tensor) -> Tensor:
    said = {}
    for side, text, before in (("", prompt.prompt, system), ("negative_", prompt.negative_prompt, None)):
        said[f"{side}prompt_embeds"], said[f"{side}prompt_attention_mask"] = _states(before, pipe, text)
    latents: Tensor = pipe(
        **said,
        height=prompt.height,
        width=prompt.width,
        num_inference_steps=prompt.sample_steps,
        guidance_scale=prompt.scale,
        cfg_trunc_ratio=prompt.cfg_trunc_ratio,
        cfg_normalization=True,
        latents=noise,
        output_type="latent",
    ).images[0]
    return latents


CASES = (
    # As one bundle, with a system prompt; `tests/families/test_lumina2_*.py` have files apart, and none.
    Case(
        family="lumina2",
        variant="2",
        pipeline=pipeline,
        write=partial(write, bundled=True),
        encoded=partial(encoded, SYSTEM),
        drawn=partial(drawn, SYSTEM),
        options={"system_prompt": SYSTEM},
        prompt=Prompt(
            prompt="a cat",
            negative_prompt="dull",
            width=48,
            height=32,
            sample_steps=4,
            scale=3.5,
            seed=1,
            cfg_trunc_ratio=0.5,
        ),
        # The last layer's states are not used.
        unmoved=r"gemma2\.(layers\.3\.|norm\.).*",
    ),
)

# --- headers of the real files; see `tinies/headers.py` ---


def gemma() -> headers.Table:
    return headers.under(GEMMA, headers.table("gemma2_2b.hf"))


def whole() -> headers.Table:
    """All in one: as ComfyUI saves it and Neta-Lumina comes."""
    net = headers.under(headers.NET, headers.transformer("lumina2"))
    begin = GEMMA.removesuffix("transformer.model.")
    marks: headers.Table = {f"{begin}logit_scale": (), f"{begin}spiece_model": (4_241_003,)}
    return net | headers.under("vae.", headers.table("flux.vae")) | gemma() | marks


def wider(tensors: headers.Table, width: int = 3840) -> headers.Table:
    """As many channels in place of Lumina's."""
    return {name: tuple(width if n == 2304 else n for n in shape) for name, shape in tensors.items()}


def diffusers() -> headers.Table:
    return headers.foreign("lumina2", headers.without(UNUSED, headers.transformer("lumina2")))


USUAL = {"lumina2": whole}
"""The models that people have, for `tests/usual_models.py`: variant -> the tensors of a single file."""
COMFYUI = {"lumina2": "lumina2"}
"""Variant -> ComfyUI's table of its adapters' keys, `fixtures/comfy.*`."""

_BLOCK = r"layers|refiner"
HEADERS: headers.Headers = {
    "lumina2": (lambda: headers.transformer("lumina2"), "lumina2 checkpoint ", "denoiser"),
    "lumina2 with prefix": (
        lambda: headers.under(headers.NET, headers.transformer("lumina2")),
        "lumina2 checkpoint ",
        "denoiser",
    ),
    "lumina2 with all": (whole, "lumina2 checkpoint ", headers.WHOLE),
    "lumina2 with vae": (
        lambda: headers.without(r"text_encoders\..*", whole()),
        "lumina2 checkpoint ",
        "denoiser, vae",
    ),
    "lumina2 with text encoder": (
        lambda: headers.without(r"vae\..*", whole()),
        "lumina2 checkpoint ",
        "denoiser, text_encoder",
    ),
    "lumina2 without the idle norm": (
        lambda: headers.without(UNUSED, headers.transformer("lumina2")),
        "lumina2 checkpoint ",
        "denoiser",
    ),
    "lumina2 of diffusers": (diffusers, "lumina2 checkpoint ", "denoiser"),
    "lumina2 in scaled fp8": (
        lambda: headers.scaled(headers.transformer("lumina2")) | {"scaled_fp8": (0,)},
        "",
        headers.SMALL,
    ),
    "lumina2 in nf4": (lambda: headers.nf4(headers.transformer("lumina2")), "", headers.SMALL),
    "lumina2 gemma2": (lambda: headers.table("gemma2_2b.hf"), "lumina2 text_encoder ", headers.ENCODER),
    "lumina2 gemma2 of transformers": (
        lambda: headers.under("model.", headers.table("gemma2_2b.hf")),
        "lumina2 text_encoder ",
        headers.ENCODER,
    ),
    "lumina2 gemma2 of a bundle": (gemma, "lumina2 text_encoder ", headers.ENCODER),
    "another gemma": (lambda: wider(headers.table("gemma2_2b.hf"), 3584), "", headers.LANGUAGE),
    "lumina2 lora": (lambda: headers.table("adapter.lumina2.lora"), "lumina2 adapter ", headers.ADAPTER),
    "lumina2 lora of the transformer": (
        lambda: headers.only("lora_unet_", headers.table("adapter.lumina2.lora")),
        "lumina2 adapter ",
        headers.ADAPTER,
    ),
    "lumina2 lora of gemma": (
        lambda: headers.only("lora_te_", headers.table("adapter.lumina2.lora")),
        "lumina2 adapter ",
        headers.ADAPTER,
    ),
    "lumina2 lora of comfy": (
        lambda: headers.lora("diffusion_model.", headers.transformer("lumina2"), _BLOCK),
        "lumina2 adapter ",
        headers.ADAPTER,
    ),
    "lumina2 lora of comfy for gemma": (
        lambda: headers.lora("", gemma(), "layers"),
        "lumina2 adapter ",
        headers.ADAPTER,
    ),
    "lumina2 lora of comfy without prefix": (
        lambda: headers.lora("", headers.transformer("lumina2"), _BLOCK),
        "lumina2 adapter ",
        headers.ADAPTER,
    ),
    "lumina2 lora of peft": (
        lambda: headers.lora("transformer.", diffusers(), _BLOCK),
        "lumina2 adapter ",
        headers.ADAPTER,
    ),
    "lumina2 lora of peft without prefix": (
        lambda: headers.lora("", diffusers(), _BLOCK),
        "lumina2 adapter ",
        headers.ADAPTER,
    ),
    "lumina2 lokr of lycoris": (
        lambda: {
            f"lycoris_layers_{i}_attention_qkv.{leaf}": shape
            for i in range(26)
            for leaf, shape in {"lokr_w1": (60, 48), "lokr_w2": (64, 48), "alpha": ()}.items()
        },
        "lumina2 adapter ",
        headers.ADAPTER,
    ),
    # Made of the same blocks.
    "newbie": (
        lambda: headers.transformer("lumina2") | {"clip_text_pooled_proj.0.weight": (1024,)},
        "lumina2 checkpoint ",
        "a NewBie model",
    ),
    "z-image of comfy": (
        lambda: (
            wider(
                {
                    name.replace("adaLN_modulation.1", "adaLN_modulation.0"): s
                    for name, s in headers.transformer("lumina2").items()
                }
            )
            | {"x_pad_token": (1, 3840), "cap_pad_token": (1, 3840)}
        ),
        "lumina2 checkpoint ",
        "a Z-Image model",
    ),
    "omnigen2": (
        lambda: diffusers() | {"ref_image_patch_embedder.weight": (2304, 64)},
        "lumina2 checkpoint ",
        "an OmniGen2 model",
    ),
    "newbie lora": (
        lambda: (
            headers.lora("diffusion_model.", headers.transformer("lumina2"), _BLOCK)
            | {"diffusion_model.time_text_embed.1.lora_A.weight": (4, 2048)}
        ),
        "",
        headers.OTHER_ADAPTER,
    ),
    "z-image lora of one layer": (
        lambda: headers.lora("diffusion_model.", wider(headers.transformer("lumina2")), r"^layers.*attention\.out"),
        "",
        headers.OTHER_ADAPTER,
    ),
    "z-image lora": (
        lambda: headers.lora("diffusion_model.", wider(headers.transformer("lumina2")), _BLOCK),
        "",
        headers.OTHER_ADAPTER,
    ),
}

FOLDERS: headers.Folders = {
    "lumina2": (diffusers, "lumina2 checkpoint "),
}
