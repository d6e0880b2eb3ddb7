"""Tiny HunyuanImage-2.1 models with random weights, from diffusers' and transformers' classes: the base model as files of
its own in Tencent's names, the distilled one as a bundle in ComfyUI's.

Sizes are the real ones' in small and differ from one another; names and layout are the real ones'. They are in eval
mode and shared between tests: not to be changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from torch import Tensor

from sfumato.families.hunyuan_image.facts import BYT5, COMFY_PREFIX, QWEN, VAE
from sfumato.families.hunyuan_image.names import COMFY, transformer_keys
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.models.meta_init import shapes
from sfumato.sampling.prompts import Prompt
from tinies import headers, llms, vaes
from tinies.cases import PROMPT, Case, Files
from tinies.encoders import randomised
from tinies.llms import BYT5_WIDTH, QWEN25VL_WIDTH

HEAD = 32


@cache
def transformer(*, distilled: bool = False) -> Any:
    """As the base model, or as the distilled one, which takes a guidance and the time of the next step."""
    return randomised(
        6,
        lambda: HunyuanImageTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=HEAD,
            num_layers=2,
            num_single_layers=3,
            num_refiner_layers=2,
            text_embed_dim=QWEN25VL_WIDTH,
            text_embed_2_dim=BYT5_WIDTH,
            rope_axes_dim=(HEAD // 2, HEAD // 2),
            guidance_embeds=distilled,
            use_meanflow=distilled,
        ),
    )


@cache
def pipeline(*, distilled: bool = False) -> Any:
    """diffusers' pipeline of the parts; the base model's guides adaptively, later where there is text in quotes."""
    guiders = {} if distilled else {"guider": guider(5), "ocr_guider": guider(38)}
    pipe = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vaes.hunyuan_vae(),
        text_encoder=llms.qwen25vl(),
        tokenizer=llms.qwen_tokenizer(),
        text_encoder_2=llms.byt5(),
        tokenizer_2=llms.byt5_tokenizer(),
        transformer=transformer(distilled=distilled),
        **guiders,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guider(start: int, scale: float = 3.5) -> AdaptiveProjectedMixGuidance:
    return AdaptiveProjectedMixGuidance(guidance_scale=scale, adaptive_projected_guidance_start_step=start)


def qwen() -> dict[str, Tensor]:
    """Qwen2.5-VL's file as the hub has it: language model, what sees, and the head."""
    tensors = llms.qwen25vl().state_dict()
    return {
        n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t for n, t in tensors.items()
    }


def parts(*, distilled: bool = False) -> dict[str, dict[str, Tensor]]:
    """The tensors of the files that people download, by part."""
    foreign, byt5 = transformer(distilled=distilled).state_dict(), llms.byt5().state_dict()
    return {
        "transformer": transformer_keys(shapes(foreign)).to_native(foreign),
        "text_encoder": qwen(),
        "byt5": {name: t for name, t in byt5.items() if name != "encoder.embed_tokens.weight"},
        "vae": vaes.hunyuan_vae_original(),
    }


def bundle(*, distilled: bool = False) -> dict[str, Tensor]:
    """All of them in one file, as ComfyUI writes it."""
    held = parts(distilled=distilled)
    held["transformer"] = COMFY.to_foreign(held["transformer"])
    prefixes = {"transformer": COMFY_PREFIX, "text_encoder": QWEN, "byt5": BYT5, "vae": VAE}
    tensors = {name: t for part, each in held.items() for name, t in add_prefix(each, prefixes[part]).items()}
    scales = {f"text_encoders.{name}.logit_scale": torch.tensor(4.6) for name in ("qwen25_7b", "byt5_small")}
    return tensors | scales


def write(distilled: bool, folder: Path) -> Files:
    llms.qwen_tokenizer().save_pretrained(folder / "tokenizer")
    llms.byt5_tokenizer().save_pretrained(folder / "tokenizer_2")
    if distilled:
        save(folder / "model.safetensors", bundle(distilled=True), {})
        return Files(model=folder / "model.safetensors")
    for name, tensors in parts().items():
        save(folder / f"{name}.safetensors", tensors, {})
    options = {name: str(folder / f"{name}.safetensors") for name in ("text_encoder", "byt5")}
    return Files(model=folder / "transformer.safetensors", options=options, vae=str(folder / "vae.safetensors"))


def encoded(pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    text, _, glyphs, _ = pipe.encode_prompt(list(captions), device="cpu", batch_size=len(captions))
    return {"text": text, "glyphs": glyphs}


def drawn(pipe: Any, prompt: Prompt, noise: Tensor) -> Tensor:
    parts = pipe.components
    if pipe.guider is not None:
        starts = {"guider": prompt.apg_start_step_general, "ocr_guider": prompt.apg_start_step_ocr}
        parts |= {name: guider(start, prompt.scale) for name, start in starts.items()}
    own = HunyuanImagePipeline(**parts)
    own.set_progress_bar_config(disable=True)
    latents: Tensor = own(
        prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        height=prompt.height,
        width=prompt.width,
        num_inference_steps=prompt.sample_steps,
        distilled_guidance_scale=prompt.guidance_scale,
        latents=noise,
        output_type="latent",
    ).images[0]
    return latents


OWN = replace(PROMPT, width=96, height=64, flow_shift=5.0, scale=3.5, guidance_scale=3.25)
APG = {"apg_start_step_general": 0, "apg_start_step_ocr": 1, "guidance_rescale": 0.0, "guidance_rescale_apg": 0.0}


def _case(variant: str, prompt: Prompt, *, distilled: bool = False) -> Case:
    return Case(
        family="hunyuan_image",
        variant=variant,
        pipeline=partial(pipeline, distilled=distilled),
        write=partial(write, distilled),
        encoded=encoded,
        drawn=drawn,
        prompt=replace(prompt, **APG),
    )


CASES = (_case("base", replace(OWN, prompt='a sign that says "cat"')),)
DISTILLED_CASE = _case("distilled", replace(OWN, guidance_scale=4.25), distilled=True)
"""Tried by the family's own tests: what it has besides is small."""

# --- headers of the real files; see `tinies/headers.py` ---


def net(*, distilled: bool = False) -> headers.Table:
    """The transformer in Tencent's names."""
    table = headers.transformer("hunyuan_image")
    times = {n.replace("time_in.", f"{m}."): s for n, s in table.items() for m in MORE if n.startswith("time_in.")}
    return table | (times if distilled else {})


MORE = ("guidance_in", "time_r_in")
"""What the distilled model has besides, like `time_in`."""


def comfy(table: headers.Table) -> headers.Table:
    """A transformer's table in ComfyUI's names."""
    return shapes(COMFY.to_foreign({name: torch.empty(shape, device="meta") for name, shape in table.items()}))


def whole(*, distilled: bool = False, prefix: str = COMFY_PREFIX, names: Any = comfy) -> headers.Table:
    """A bundle as ComfyUI writes it."""
    held = {
        prefix: names(net(distilled=distilled)),
        QWEN: headers.without(r"lm_head\..*", headers.table("qwen2_5_vl_7b.hf")),
        BYT5: headers.table("byt5_small_glyph.hf"),
        VAE: headers.table("hunyuan_image.vae"),
    }
    return {name: shape for start, table in held.items() for name, shape in headers.under(start, table).items()}


def refiner() -> headers.Table:
    """Latents of one frame with a noised image beside them, and no glyphs."""
    table = headers.without(r"byt5_in\..*", net(distilled=True))
    return table | {"img_in.proj.weight": (3328, 128, 1, 1, 1)}


def video() -> headers.Table:
    """HunyuanVideo 1.5, made of the same layers."""
    return net() | {"img_in.proj.weight": (2048, 65, 1, 1, 1)}


def lora(prefix: str, table: headers.Table, only: str = "(double|single)_blocks") -> headers.Table:
    return headers.lora(prefix, table, only)


def foreign(*, distilled: bool = False) -> headers.Table:
    return headers.foreign("hunyuan_image", net(distilled=distilled))


USUAL = {"base": lambda: whole(names=lambda table: table, prefix=headers.NET)}
"""The models that people have, for `tests/usual_models.py`: variant -> the tensors of a single file."""
COMFYUI = {"base": "hunyuan_image"}
"""Variant -> ComfyUI's table of its adapters' keys, `fixtures/comfy.*`."""
BASE, DISTILLED, OURS = (
    "hunyuan_image checkpoint base",
    "hunyuan_image checkpoint distilled",
    "hunyuan_image adapter .*",
)
BLOCKS = "transformer_blocks"

HEADERS: headers.Headers = {
    "hunyuan_image": (net, BASE, "denoiser"),
    "hunyuan_image with prefix": (lambda: headers.under(headers.NET, net()), BASE, "denoiser"),
    "hunyuan_image distilled": (lambda: net(distilled=True), DISTILLED, "denoiser"),
    "hunyuan_image of comfy": (lambda: comfy(net()), BASE, "denoiser"),
    "hunyuan_image distilled of comfy": (lambda: comfy(net(distilled=True)), DISTILLED, "denoiser"),
    "hunyuan_image with all": (whole, BASE, headers.WHOLE),
    "hunyuan_image distilled with all": (lambda: whole(distilled=True), DISTILLED, headers.WHOLE),
    "hunyuan_image of diffusers": (foreign, BASE, "denoiser"),
    "hunyuan_image distilled of diffusers": (lambda: foreign(distilled=True), DISTILLED, "denoiser"),
    "hunyuan_image in scaled fp8": (lambda: headers.scaled(net()) | {"scaled_fp8": (2,)}, "", headers.SMALL),
    "hunyuan_image of comfy in scaled fp8": (
        lambda: headers.scaled(comfy(net())) | {"scaled_fp8": (2,)},
        "",
        headers.SMALL,
    ),
    "hunyuan_image in nf4": (lambda: headers.nf4(net()), "", headers.SMALL),
    "hunyuan_image refiner": (refiner, "hunyuan_image checkpoint refiner", "the refiner of HunyuanImage-2.1"),
    "hunyuan_image refiner of comfy": (
        lambda: comfy(refiner()),
        "hunyuan_image checkpoint refiner",
        "the refiner of HunyuanImage-2.1",
    ),
    "hunyuan_image refiner of diffusers": (
        lambda: headers.foreign("hunyuan_image", refiner()),
        "hunyuan_image checkpoint refiner",
        "the refiner of HunyuanImage-2.1",
    ),
    "hunyuan_image lora": (lambda: headers.table("adapter.hunyuan_image.lora"), OURS, headers.ADAPTER),
    "hunyuan_image lora in kohyas spelling of comfys names": (
        lambda: {
            name.replace("mlp_fc1", "mlp_0").replace("mlp_fc2", "mlp_2").replace("_linear.", "_lin."): shape
            for name, shape in headers.table("adapter.hunyuan_image.lora").items()
        },
        OURS,
        headers.ADAPTER,
    ),
    "hunyuan_image lora of comfy": (lambda: lora("diffusion_model.", comfy(net())), OURS, headers.ADAPTER),
    "hunyuan_image lora of comfy with the official names": (
        lambda: lora("diffusion_model.", net()),
        OURS,
        headers.ADAPTER,
    ),
    "hunyuan_image lora of peft": (lambda: lora("transformer.", foreign(), BLOCKS), OURS, headers.ADAPTER),
    "hunyuan_image lora of peft of the first layers": (
        lambda: lora("transformer.", foreign(), r"^transformer_blocks\.\d\."),
        OURS,
        headers.ADAPTER,
    ),
    "hunyuan_image lora of a model for videos": (
        lambda: {
            name: tuple(2048 if n == 3584 else n for n in shape)
            for name, shape in headers.table("adapter.hunyuan_image.lora").items()
        },
        "",
        headers.OTHER_ADAPTER,
    ),
    "hunyuan_image for videos": (video, "", headers.UNKNOWN),
    "hunyuanvideo lora of two-layer nets": (
        lambda: {
            name: tuple(3072 if n == 3584 else n for n in shape)
            for name, shape in lora("diffusion_model.", net(), r"_mlp\.fc1").items()
        },
        "",
        headers.OTHER_ADAPTER,
    ),
    "hunyuan_image vae": (lambda: headers.table("hunyuan_image.vae"), "hunyuan_image vae ", headers.VAE),
    "hunyuan_image vae with prefix": (
        lambda: headers.under(VAE, headers.table("hunyuan_image.vae")),
        "hunyuan_image vae ",
        headers.VAE,
    ),
    "hunyuan_image qwen2.5-vl": (
        lambda: headers.table("qwen2_5_vl_7b.hf"),
        "hunyuan_image text_encoder ",
        headers.ENCODER,
    ),
    "hunyuan_image qwen2.5-vl of transformers 5": (
        lambda: {
            name.replace("model.", "model.language_model.").replace("visual.", "model.visual."): shape
            for name, shape in headers.table("qwen2_5_vl_7b.hf").items()
        },
        "hunyuan_image text_encoder ",
        headers.ENCODER,
    ),
    "hunyuan_image byt5": (
        lambda: headers.table("byt5_small_glyph.hf"),
        "hunyuan_image text_encoder ",
        headers.ENCODER,
    ),
}

FOLDERS: headers.Folders = {
    "hunyuan_image": (foreign, BASE),
    "hunyuan_image distilled": (lambda: foreign(distilled=True), DISTILLED),
}
