"""Chroma in small, with random weights from diffusers' and transformers' classes.

Sizes are the real ones' in small and differ from one another; names and layout are the real ones'. It is in eval mode
and shared between tests: not to be changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sfumato.families.chroma.names import chroma_keys
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.models.autoencoders import vae_keys
from sfumato.models.meta_init import shapes
from sfumato.sampling.prompts import Prompt
from tinies import headers
from tinies.cases import Case, Files
from tinies.encoders import T5_WIDTH, t5, t5_tokenizer, vae16
from tinies.flux import AXES, HEAD, unsettle


@cache
def transformer() -> Any:
    """The transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ChromaTransformer2DModel(
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=HEAD,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            axes_dims_rope=AXES,
            approximator_num_channels=32,
            approximator_hidden_dim=48,
            approximator_layers=2,
        )
        return unsettle(model).eval()


@cache
def pipeline() -> ChromaPipeline:
    """diffusers' pipeline, with the shift of FLUX that it is written for."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = ChromaPipeline(
        scheduler, vae=vae16(), text_encoder=t5(), tokenizer=t5_tokenizer(), transformer=transformer()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def native(prefix: str = "") -> dict[str, Tensor]:
    """The transformer's tensors as its own file names them."""
    foreign = transformer().state_dict()
    return add_prefix(chroma_keys(shapes(foreign)).to_native(foreign), prefix)


def autoencoder(prefix: str = "") -> dict[str, Tensor]:
    """The VAE's tensors as FLUX's `ae.safetensors` names them."""
    held = vae16().state_dict()
    return add_prefix(vae_keys(held).to_foreign(held), prefix)


def write(folder: Path) -> Files:
    """The transformer as it is downloaded, T5 and the VAE in files of their own."""
    save(folder / "model.safetensors", native(), {})
    save(folder / "t5xxl.safetensors", t5().state_dict(), {})
    save(folder / "ae.safetensors", autoencoder(), {})
    t5_tokenizer().save_pretrained(folder / "tokenizer")
    return Files(
        model=folder / "model.safetensors",
        options={"t5xxl": str(folder / "t5xxl.safetensors")},
        vae=str(folder / "ae.safetensors"),
    )


def encoded(pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    """As many rows as the longest caption uses: the pipeline always makes 512."""
    states, _, mask, *_ = pipe.encode_prompt(list(captions), device="cpu", do_classifier_free_guidance=False)
    rows = int(mask.sum(1).max())
    return {"t5": states[:, :rows], "t5_mask": mask[:, :rows].bool()}


@contextmanager
def true_mask(model: Any) -> Iterator[None]:
    """diffusers' pipeline makes its mask of 0.0 and 1.0, which is added to the scores and so hides nothing: here it is one of False and True."""

    def hook(_: Any, args: tuple[Any, ...], told: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**told, "attention_mask": told["attention_mask"].bool()}

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def drawn(pipe: Any, prompt: Prompt, noise: Tensor) -> Tensor:
    with true_mask(pipe.transformer):
        drawn = pipe(
            prompt.prompt,
            negative_prompt=prompt.negative_prompt,
            height=prompt.height,
            width=prompt.width,
            num_inference_steps=prompt.sample_steps,
            guidance_scale=prompt.scale,
            latents=pipe._pack_latents(noise, *noise.shape),
            output_type="latent",
        )
    latents: Tensor = pipe._unpack_latents(drawn.images, prompt.height, prompt.width, 8)[0]
    return latents


CASES = (
    Case(
        family="chroma",
        variant="1",
        pipeline=pipeline,
        write=write,
        encoded=encoded,
        drawn=drawn,
        # It says how the blocks work at each time, and stays as it is while they learn.
        unmoved=r"denoiser\.distilled_guidance_layer\..*",
    ),
)

# --- headers of the real files; see `tinies/headers.py` ---

USUAL = {"chroma": lambda: headers.under(headers.NET, headers.transformer("chroma")) | headers.text("t5xxl")}
"""The models that people have, for `tests/usual_models.py`: variant -> the tensors of a single file."""
COMFYUI = {"chroma": "chroma"}
"""Variant -> ComfyUI's table of its adapters' keys, `fixtures/comfy.*`."""

HEADERS: headers.Headers = {
    "chroma": (lambda: headers.transformer("chroma"), "chroma checkpoint ", "denoiser"),
    "chroma with prefix": (
        lambda: headers.under(headers.NET, headers.transformer("chroma")),
        "chroma checkpoint ",
        "denoiser",
    ),
    "chroma with all": (lambda: headers.comfy("chroma"), "chroma checkpoint ", headers.WHOLE),
    "chroma of diffusers": (
        lambda: headers.foreign("chroma", headers.transformer("chroma")),
        "chroma checkpoint ",
        "denoiser",
    ),
    "chroma in scaled fp8": (
        lambda: headers.scaled(headers.transformer("chroma"), "weight_scale"),
        "",
        headers.SMALL,
    ),
    "chroma controlnet": (
        lambda: {
            name: shape
            for name, shape in headers.table("flux.controlnet").items()
            if "_mod." not in name and name.partition(".")[0] not in ("time_in", "vector_in", "guidance_in")
        },
        "chroma controlnet ",
        headers.CONTROL,
    ),
    # An adapter that leaves the modulations alone is the same for FLUX.1 and Chroma.
    "chroma lora": (lambda: headers.table("adapter.chroma.lora"), "(flux|chroma) adapter .*", headers.ADAPTER),
    "chroma lora of comfy": (
        lambda: headers.lora("diffusion_model.", headers.transformer("chroma")),
        "(flux|chroma) adapter .*",
        headers.ADAPTER,
    ),
    "chroma lora of peft": (
        lambda: headers.lora("transformer.", headers.foreign("chroma", headers.transformer("chroma"))),
        "(flux|chroma) adapter .*",
        headers.ADAPTER,
    ),
}

FOLDERS: headers.Folders = {
    "chroma": (lambda: headers.foreign("chroma", headers.transformer("chroma")), "chroma checkpoint "),
}
