"""Tiny FLUX.1 models with random weights, from diffusers' classes: dev as files of its own, schnell as one bundle.

Sizes are the real ones' in small and differ from one another; names and layout are the real ones'. They are in eval
mode and shared between tests: not to be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from sfumato.families.flux.facts import CLIP_L, T5XXL, VAE
from sfumato.families.flux.names import flux_keys
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.models.autoencoders import vae_keys
from sfumato.models.detection import PREFIX
from sfumato.models.meta_init import shapes
from sfumato.sampling.prompts import Prompt
from tinies import encoders, headers
from tinies.cases import PROMPT, Case, Files
from tinies.encoders import L_WIDTH, T5_WIDTH

HEAD = 32
AXES = (4, 14, 14)
"""Of the rotary embedding, in the ratio of the real (16, 56, 56)."""


@cache
def transformer(*, guidance: bool = True) -> Any:
    """As dev, or as schnell, which takes no guidance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=HEAD,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=L_WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=AXES,
        )
        return unsettle(model).eval()


def unsettle(model: nn.Module) -> nn.Module:
    """Moves biases and norms off their 0 and 1, which would hide a wrong place."""
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.05 * torch.randn_like(p)
    return model


@cache
def pipeline(*, guidance: bool = True) -> Any:
    """diffusers' pipeline of the parts, with the published models' schedulers."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance, base_shift=0.5, max_shift=1.15
        ),
        vae=encoders.vae16(),
        text_encoder=encoders.clip_l(),
        tokenizer=encoders.clip_tokenizer(),
        text_encoder_2=encoders.t5(),
        tokenizer_2=encoders.t5_tokenizer(),
        transformer=transformer(guidance=guidance),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(*, guidance: bool = True) -> dict[str, dict[str, Tensor]]:
    """The tensors of the files that people download, by part."""
    foreign, vae, t5 = (
        transformer(guidance=guidance).state_dict(),
        encoders.vae16().state_dict(),
        encoders.t5().state_dict(),
    )
    return {
        "transformer": flux_keys(shapes(foreign)).to_native(foreign),
        "clip_l": tiny.text_states(encoders.clip_l()),
        "t5xxl": {name: t for name, t in t5.items() if name != "encoder.embed_tokens.weight"},
        "vae": vae_keys(vae).to_foreign(vae),
    }


def bundle(*, guidance: bool = True) -> dict[str, Tensor]:
    """All of them in one file, as ComfyUI writes it."""
    prefixes = {"transformer": PREFIX, "clip_l": CLIP_L, "t5xxl": T5XXL, "vae": VAE}
    held = {
        name: t
        for part, tensors in parts(guidance=guidance).items()
        for name, t in add_prefix(tensors, prefixes[part]).items()
    }
    return held | {
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6),
        f"{CLIP_L}text_projection.weight": torch.eye(L_WIDTH),
    }


def write(guidance: bool, folder: Path) -> Files:
    encoders.clip_tokenizer().save_pretrained(folder / "tokenizer")
    encoders.t5_tokenizer().save_pretrained(folder / "tokenizer_2")
    if not guidance:
        save(folder / "model.safetensors", bundle(guidance=False), {})
        return Files(model=folder / "model.safetensors")
    for name, tensors in parts().items():
        save(folder / f"{name}.safetensors", tensors, {})
    options = {name: str(folder / f"{name}.safetensors") for name in ("clip_l", "t5xxl")}
    return Files(model=folder / "transformer.safetensors", options=options, vae=str(folder / "vae.safetensors"))


def encoded(length: int, pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    t5, pooled, _ = pipe.encode_prompt(list(captions), None, device="cpu", max_sequence_length=length)
    return {"pooled": pooled, "t5": t5}


def encoded_alone(length: int, pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    """Each caption at its own length, so that there is no padding to hide; then zeros to that of the longest."""
    tokens = pipe.tokenizer_2(
        list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    used = tokens.attention_mask.sum(1).tolist()
    rows = [
        pipe.encode_prompt(caption, None, device="cpu", max_sequence_length=n)[:2]
        for caption, n in zip(captions, used, strict=True)
    ]
    t5 = [
        torch.nn.functional.pad(states[0], (0, 0, 0, max(used) - n)) for (states, _), n in zip(rows, used, strict=True)
    ]
    mask = tokens.attention_mask[:, : max(used)].bool()
    return {"pooled": torch.cat([pooled for _, pooled in rows]), "t5": torch.stack(t5), "t5_mask": mask}


def drawn(
    encode: Callable[[Any, Sequence[str]], Mapping[str, Tensor]], pipe: Any, prompt: Prompt, noise: Tensor
) -> Tensor:
    b, c, h, w = noise.shape
    said = {}
    for side, text in (("", prompt.prompt), ("negative_", prompt.negative_prompt)):
        cond = encode(pipe, [text])
        n = int(cond["t5_mask"].sum()) if "t5_mask" in cond else None
        said |= {f"{side}prompt_embeds": cond["t5"][:, :n], f"{side}pooled_prompt_embeds": cond["pooled"]}
    packed = pipe(
        **said,
        true_cfg_scale=prompt.scale,
        height=prompt.height,
        width=prompt.width,
        num_inference_steps=prompt.sample_steps,
        guidance_scale=prompt.guidance_scale or 3.5,
        latents=pipe._pack_latents(noise, b, c, h, w),
        output_type="latent",
    ).images
    latents: Tensor = pipe._unpack_latents(packed, prompt.height, prompt.width, 8)[0]
    return latents


def _case(variant: str, encode: Any, prompt: Prompt, *, guidance: bool = True, **options: Any) -> Case:
    return Case(
        family="flux",
        variant=variant,
        pipeline=partial(pipeline, guidance=guidance),
        write=partial(write, guidance),
        encoded=encode,
        drawn=partial(drawn, encode),
        options=options,
        prompt=prompt,
    )


CASES = (
    _case("dev", partial(encoded, 512), replace(PROMPT, scale=1.0, guidance_scale=4.2)),
    _case(
        "dev-masked",
        partial(encoded_alone, 512),
        replace(PROMPT, negative_prompt="a dog", guidance_scale=2.0),
        apply_t5_attn_mask=True,
        train_t5xxl=True,
    ),
    _case("schnell", partial(encoded, 256), replace(PROMPT, scale=3.0), guidance=False),
)

# --- headers of the real files; see `tinies/headers.py` ---

USUAL = {"dev": lambda: headers.comfy("flux_dev")}
"""The models that people have, for `tests/usual_models.py`: variant -> the tensors of a single file."""
COMFYUI = {"dev": "flux_dev"}
"""Variant -> ComfyUI's table of its adapters' keys, `fixtures/comfy.*`."""

HEADERS: headers.Headers = {
    "flux dev": (lambda: headers.transformer("flux_dev"), "flux checkpoint dev", "denoiser"),
    "flux schnell": (lambda: headers.transformer("flux_schnell"), "flux checkpoint schnell", "denoiser"),
    "flux dev with prefix": (
        lambda: headers.under(headers.NET, headers.transformer("flux_dev")),
        "flux checkpoint dev",
        "denoiser",
    ),
    "flux dev with all": (lambda: headers.comfy("flux_dev"), "flux checkpoint dev", headers.WHOLE),
    "flux schnell with all": (lambda: headers.comfy("flux_schnell"), "flux checkpoint schnell", headers.WHOLE),
    "flux dev of diffusers": (
        lambda: headers.foreign("flux", headers.transformer("flux_dev")),
        "flux checkpoint dev",
        "denoiser",
    ),
    "flux dev in scaled fp8": (
        lambda: headers.scaled(headers.transformer("flux_dev")) | {"scaled_fp8": (2,)},
        "",
        headers.SMALL,
    ),
    "flux dev in nf4": (lambda: headers.scaled(headers.comfy("flux_dev"), "weight.absmax"), "", headers.SMALL),
    "flux for filling": (
        lambda: headers.transformer("flux_dev") | {"img_in.weight": (3072, 384)},
        "flux checkpoint dev",
        headers.LATER,
    ),
    "flux lora": (lambda: headers.table("adapter.flux.lora"), "flux adapter .*", headers.ADAPTER),
    "flux lora of comfy": (
        lambda: headers.lora("diffusion_model.", headers.transformer("flux_dev")),
        "flux adapter .*",
        headers.ADAPTER,
    ),
    "flux lora of peft": (
        lambda: headers.lora("transformer.", headers.foreign("flux", headers.transformer("flux_dev"))),
        "flux adapter .*",
        headers.ADAPTER,
    ),
    "flux.2 lora of comfy": (
        lambda: {
            n: tuple(6144 if i == 3072 else i for i in s)
            for n, s in headers.lora("diffusion_model.", headers.transformer("flux_dev"), r"_attn\.").items()
        },
        "",
        headers.OTHER_ADAPTER,
    ),
    # Qwen-Image has layers of these names and sizes as well.
    "flux lora of the first layers": (
        lambda: headers.lora(
            "transformer.", headers.foreign("flux", headers.transformer("flux_dev")), r"^transformer_blocks\.\d\."
        ),
        "",
        headers.OTHER_ADAPTER,
    ),
    "flux controlnet": (lambda: headers.table("flux.controlnet"), "flux controlnet .*", headers.CONTROL),
}

FOLDERS: headers.Folders = {
    "flux dev": (lambda: headers.foreign("flux", headers.transformer("flux_dev")), "flux checkpoint dev"),
    "flux schnell": (lambda: headers.foreign("flux", headers.transformer("flux_schnell")), "flux checkpoint schnell"),
}
