"""Stable Diffusion 1.x and 2.x in small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny
from torch import Tensor

from sfumato.sampling.prompts import Prompt
from sfumato.sampling.sample import scheduler_for
from sfumato.tensors.noise import DDPM
from tinies import headers
from tinies.cases import Case, Files


def write(v2: bool, folder: Path) -> Files:
    return Files(model=(tiny.tiny_sd2 if v2 else tiny.tiny_sd1)(folder))


def encoded(pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    return {"hidden": pipe.encode_prompt(list(captions), "cpu", 1, False)[0]}


def drawn(pipe: Any, prompt: Prompt, noise: Tensor) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_for(DDPM(), "euler")
    drawn = pipe(
        prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        height=prompt.height,
        width=prompt.width,
        num_inference_steps=prompt.sample_steps,
        guidance_scale=prompt.scale,
        latents=noise,
        output_type="latent",
    )
    latents: Tensor = drawn.images[0]
    return latents


CASES = tuple(
    Case(
        family="sd",
        variant=variant,
        pipeline=partial(tiny.pipeline, v2=v2),
        write=partial(write, v2),
        encoded=encoded,
        drawn=drawn,
    )
    for variant, v2 in (("1", False), ("2", True))
)

# --- headers of the real files; see `tinies/headers.py` ---

USUAL = {"v1": lambda: headers.sd(1), "v2": lambda: headers.sd(2)}
"""The models that people have, for `tests/usual_models.py`: variant -> the tensors of a single file."""
COMFYUI = {"v1": "sd1"}
"""Variant -> ComfyUI's table of its adapters' keys, `fixtures/comfy.*`."""

HEADERS: headers.Headers = {
    "sd1": (lambda: headers.sd(1), "sd checkpoint v1", headers.WHOLE),
    "sd2": (lambda: headers.sd(2), "sd checkpoint v2", headers.WHOLE),
    "sd1 without vae": (
        lambda: headers.without(f"{headers.FIRST}.*", headers.sd(1)),
        "sd checkpoint v1",
        "denoiser, text_encoder",
    ),
    "sd1 unet with prefix": (lambda: headers.only(headers.NET, headers.sd(1)), "sd checkpoint v1", headers.NO_TEXT),
    "sd2 unet bare": (lambda: headers.below(headers.NET, headers.sd(2)), "sd checkpoint v2", headers.NO_TEXT),
    "sd1 unet of diffusers": (lambda: headers.table("sd1.unet.diffusers"), "sd checkpoint v1", headers.NO_TEXT),
    "sd1 lora": (lambda: headers.table("adapter.sd1.lora"), "sd adapter v1", headers.ADAPTER),
    "sd1 locon": (lambda: headers.table("adapter.sd1.locon"), "sd adapter v1", headers.ADAPTER),
    "sd1 lora of comfy": (
        lambda: headers.lora("diffusion_model.", headers.below(headers.NET, headers.sd(1))),
        "sd adapter v1|sd adapter ",
        headers.ADAPTER,
    ),
    "sd2 lora of peft": (
        lambda: headers.lora("unet.", headers.table("sd2.unet.diffusers")),
        "sd adapter v2",
        headers.ADAPTER,
    ),
    "sd1 controlnet": (
        lambda: (
            headers.under("control_model.", headers.without("out.*", headers.below(headers.NET, headers.sd(1))))
            | {"control_model.zero_convs.0.0.weight": (320, 320, 1, 1)}
        ),
        "sd controlnet v1",
        headers.CONTROL,
    ),
    "sd embedding": (lambda: {"emb_params": (4, 768)}, "sd embedding v1", "is a textual inversion embedding"),
}

FOLDERS: headers.Folders = {
    "sd1": (lambda: headers.table("sd1.unet.diffusers"), "sd checkpoint v1"),
    "sd2": (lambda: headers.table("sd2.unet.diffusers"), "sd checkpoint v2"),
}
