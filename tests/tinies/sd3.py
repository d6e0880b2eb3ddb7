"""Tiny Stable Diffusion 3 and 3.5 models with random weights, from diffusers' classes: 3 as one bundle, 3.5 as files of its own.

Sizes are the real ones' in small and differ from one another; names and layout are the real ones'. They are in eval
mode and shared between tests: not to be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import tiny
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional
from transformers import T5Config, T5EncoderModel

from sfumato.families.sd3.names import CLIP_G, CLIP_L, T5, VAE, transformer_keys
from sfumato.formats.files import save
from sfumato.formats.names import add_prefix
from sfumato.models.autoencoders import vae_keys
from sfumato.models.detection import PREFIX
from sfumato.sampling.prompts import Prompt
from tinies import encoders, headers
from tinies.cases import Case, Files
from tinies.encoders import G_WIDTH, L_WIDTH, randomised

Kind = Literal["medium", "3.5_medium", "3.5_large"]
KINDS: tuple[Kind, ...] = get_args(Kind)
POOLED = L_WIDTH + G_WIDTH
CONTEXT = 256
"""Width of the text states: T5's, which both CLIPs' side by side are padded to."""
SIDE = 12
"""Patches along a side of the table of positions."""
CLIP_ROWS = 77


@cache
def transformer(kind: Kind) -> Any:
    """3.5 normalises queries and keys; the first blocks of 3.5 medium attend twice."""
    return randomised(
        7,
        lambda: SD3Transformer2DModel(
            sample_size=16,
            num_layers=3,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=CONTEXT,
            caption_projection_dim=128,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=SIDE,
            dual_attention_layers=(0, 1) if kind == "3.5_medium" else (),
            qk_norm=None if kind == "medium" else "rms_norm",
        ),
    )


@cache
def clip_l() -> Any:
    """CLIP-L with the projection of SD3, which is near the identity."""
    model = deepcopy(encoders.clip_l_projected())
    model.text_projection.weight.data = torch.eye(L_WIDTH) + 2 * model.text_projection.weight
    return model


@cache
def t5() -> Any:
    """T5, as wide as the text states are here."""
    config = T5Config(
        vocab_size=len(encoders.t5_tokenizer()),
        d_model=CONTEXT,
        d_kv=64,
        d_ff=160,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=16,
        feed_forward_proj="gated-gelu",
    )
    return randomised(8, lambda: T5EncoderModel(config))


@cache
def vae() -> Any:
    """The 16-channel VAE with the scaling of SD3."""
    common = encoders.vae16()
    made = AutoencoderKL.from_config({**common.config, "scaling_factor": 1.5305, "shift_factor": 0.0609})
    made.load_state_dict(common.state_dict())
    return made.eval()


@cache
def pipeline(kind: Kind) -> Any:
    """diffusers' pipeline of the parts; that of 3.5 large goes without T5, as it may."""
    alone = kind == "3.5_large"
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip_l(),
        tokenizer=encoders.clip_tokenizer(),
        text_encoder_2=encoders.clip_g(),
        tokenizer_2=encoders.clip_tokenizer(g=True),
        text_encoder_3=None if alone else t5(),
        tokenizer_3=None if alone else encoders.t5_tokenizer(),
        transformer=transformer(kind),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(kind: Kind) -> dict[str, dict[str, Tensor]]:
    """The tensors of the files that people download, by part."""
    foreign, latent = transformer(kind).state_dict(), vae().state_dict()
    return {
        "transformer": transformer_keys(foreign).to_native(foreign),
        "vae": vae_keys(latent).to_foreign(latent),
        "clip_l": tiny.text_states(clip_l()),
        "clip_g": tiny.text_states(encoders.clip_g()),
        "t5xxl": {name: t for name, t in t5().state_dict().items() if name != "encoder.embed_tokens.weight"},
    }


def single_file(kind: Kind, *names: str) -> dict[str, Tensor]:
    """Some of them in one file; both CLIPs as ComfyUI writes them."""
    prefixes = {"transformer": PREFIX, "vae": VAE, "clip_l": CLIP_L, "clip_g": CLIP_G, "t5xxl": T5}
    held = {key: t for name in names for key, t in add_prefix(parts(kind)[name], prefixes[name]).items()}
    return held | {f"text_encoders.{name}.logit_scale": torch.tensor(4.6) for name in names if name.startswith("clip")}


def write(kind: Kind, folder: Path) -> Files:
    """medium: all in one. 3.5 medium: transformer and VAE in one, the encoders apart. 3.5 large: all apart, and no T5."""
    encoders.clip_tokenizer().save_pretrained(folder / "tokenizer")
    encoders.clip_tokenizer(g=True).save_pretrained(folder / "tokenizer_2")
    encoders.t5_tokenizer().save_pretrained(folder / "tokenizer_3")
    model, latent, *texts = (folder / f"{name}.safetensors" for name in parts(kind))
    if kind == "medium":
        save(model, single_file(kind, *parts(kind)), {})
        return Files(model=model)
    for path, tensors in zip([model, latent, *texts], parts(kind).values(), strict=True):
        save(path, tensors, {})
    options = {path.stem: str(path) for path in texts}
    if kind == "3.5_medium":
        save(model, single_file(kind, "transformer", "vae"), {})
        return Files(model=model, options=options)
    return Files(
        model=model, options={name: path for name, path in options.items() if name != "t5xxl"}, vae=str(latent)
    )


def told(pipe: Any, captions: Sequence[str], length: int = 256) -> tuple[Tensor, Tensor]:
    """The text states and the pooled text that the pipeline tells the transformer."""
    states, _, pooled, _ = pipe.encode_prompt(
        list(captions), None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
    )
    return states, pooled


def encoded(pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    """What each encoder says, cut out of what the pipeline puts together."""
    states, pooled = told(pipe, captions)
    clip_l, clip_g, rest = states[:, :CLIP_ROWS].split([L_WIDTH, G_WIDTH, CONTEXT - POOLED], -1)
    assert not rest.any()
    pooled_l, pooled_g = pooled.split([L_WIDTH, G_WIDTH], -1)
    said = {"clip_l": clip_l, "clip_g": clip_g, "clip_l_pooled": pooled_l, "clip_g_pooled": pooled_g}
    return said if pipe.text_encoder_3 is None else {**said, "t5": states[:, CLIP_ROWS:]}


def encoded_alone(pipe: Any, captions: Sequence[str]) -> Mapping[str, Tensor]:
    """The same where padding is hidden: each caption's own rows, T5's at its own length, which leaves nothing to hide; then zeros."""
    rows, counts = [], {}
    for caption in captions:
        for name, tokenizer, most in (("clip", pipe.tokenizer, CLIP_ROWS), ("t5", pipe.tokenizer_3, 256)):
            counts[name] = len(tokenizer(caption, truncation=True, max_length=most).input_ids)
        states, pooled = told(pipe, [caption], counts["t5"])
        clips, t5 = states[0, : counts["clip"]], states[0, CLIP_ROWS:]
        padded = [functional.pad(part, (0, 0, 0, n - len(part))) for part, n in ((clips, CLIP_ROWS), (t5, 256))]
        rows.append((*padded, torch.arange(256) < counts["t5"], pooled[0]))
    clips, t5, mask, pooled = (torch.stack(part) for part in zip(*rows, strict=True))
    return {
        "clip_l": clips[..., :L_WIDTH],
        "clip_g": clips[..., L_WIDTH:POOLED],
        "clip_l_pooled": pooled[:, :L_WIDTH],
        "clip_g_pooled": pooled[:, L_WIDTH:],
        "t5": t5,
        "t5_mask": mask,
    }


def drawn(
    encode: Callable[[Any, Sequence[str]], Mapping[str, Tensor]], pipe: Any, prompt: Prompt, noise: Tensor
) -> Tensor:
    words: dict[str, Any] = {"prompt": prompt.prompt, "negative_prompt": prompt.negative_prompt}
    if encode is encoded_alone:
        words = {}
        for side, text in (("", prompt.prompt), ("negative_", prompt.negative_prompt)):
            said = encode(pipe, [text])
            clips = functional.pad(torch.cat([said["clip_l"], said["clip_g"]], -1), (0, CONTEXT - POOLED))
            words[f"{side}prompt_embeds"] = torch.cat([clips, said["t5"]], 1)
            words[f"{side}pooled_prompt_embeds"] = torch.cat([said["clip_l_pooled"], said["clip_g_pooled"]], -1)
    latents: Tensor = pipe(
        **words,
        height=prompt.height,
        width=prompt.width,
        num_inference_steps=prompt.sample_steps,
        guidance_scale=prompt.scale,
        latents=noise,
        output_type="latent",
    ).images[0]
    return latents


CASES = tuple(
    Case(
        family="sd3",
        variant=kind + ending,
        pipeline=partial(pipeline, kind),
        write=partial(write, kind),
        encoded=encode,
        drawn=partial(drawn, encode),
        options=options,
        # Nothing sees the text after the last block, so what it looks for there does not count.
        unmoved=r"denoiser\.joint_blocks\.2\.context_block\.attn\.ln_q\.weight",
    )
    for kind, ending, encode, options in (
        *((kind, "", encoded, {}) for kind in KINDS),
        (
            "3.5_medium",
            "_masked",
            encoded_alone,
            {"apply_lg_attn_mask": True, "apply_t5_attn_mask": True, "train_t5xxl": True},
        ),
    )
)

# --- headers of the real files; see `tinies/headers.py` ---

USUAL = {
    kind: lambda kind=kind: headers.sd3(f"sd{kind}", "clip_l", "clip_g", "t5xxl")
    for kind in ("3_medium", "3.5_medium", "3.5_large")
}
"""The models that people have, for `tests/usual_models.py`: variant -> the tensors of a single file."""
COMFYUI = {"3.5_medium": "sd3.5_medium"}
"""Variant -> ComfyUI's table of its adapters' keys, `fixtures/comfy.*`."""

HEADERS: headers.Headers = {
    "sd3 medium": (lambda: headers.sd3("sd3_medium"), "sd3 checkpoint medium", "denoiser, vae"),
    "sd3 medium with text encoders": (
        lambda: headers.sd3("sd3_medium", "clip_l", "clip_g", "t5xxl"),
        "sd3 checkpoint medium",
        headers.WHOLE,
    ),
    "sd3.5 medium": (lambda: headers.sd3("sd3.5_medium"), "sd3 checkpoint 3.5-medium", "denoiser, vae"),
    "sd3.5 large with clips": (
        lambda: headers.sd3("sd3.5_large", "clip_l", "clip_g"),
        "sd3 checkpoint 3.5-large",
        headers.WHOLE,
    ),
    "sd3.5 medium bare": (lambda: headers.transformer("sd3.5_medium"), "sd3 checkpoint 3.5-medium", "denoiser"),
    "sd3.5 large with prefix": (
        lambda: headers.under(headers.NET, headers.transformer("sd3.5_large")),
        "sd3 checkpoint 3.5-large",
        "denoiser",
    ),
    "sd3 medium of diffusers": (
        lambda: headers.foreign("sd3", headers.transformer("sd3_medium")),
        "sd3 checkpoint medium",
        "denoiser",
    ),
    "sd3.5 medium of diffusers": (
        lambda: headers.foreign("sd3", headers.transformer("sd3.5_medium")),
        "sd3 checkpoint 3.5-medium",
        "denoiser",
    ),
    "sd3 lora": (lambda: headers.table("adapter.sd3_medium.lora"), "sd3 adapter ", headers.ADAPTER),
    "sd3.5 lora of comfy": (
        lambda: headers.lora("diffusion_model.", headers.transformer("sd3.5_medium")),
        "sd3 adapter 3.5-medium",
        headers.ADAPTER,
    ),
    "sd3.5 lora of peft": (
        lambda: headers.lora("transformer.", headers.foreign("sd3", headers.transformer("sd3.5_large"))),
        "sd3 adapter 3.5-large",
        headers.ADAPTER,
    ),
}

FOLDERS: headers.Folders = {
    "sd3 medium": (lambda: headers.foreign("sd3", headers.transformer("sd3_medium")), "sd3 checkpoint medium"),
    "sd3.5 medium": (lambda: headers.foreign("sd3", headers.transformer("sd3.5_medium")), "sd3 checkpoint 3.5-medium"),
    "sd3.5 large": (lambda: headers.foreign("sd3", headers.transformer("sd3.5_large")), "sd3 checkpoint 3.5-large"),
}
