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
