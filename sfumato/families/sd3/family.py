"""The record of Stable Diffusion 3 and 3.5: where its nets stand in files, and how they are run and adapted."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.adapters import AdapterPlan
from sfumato.config import FamilyOptions, LossConfig, NoiseConfig
from sfumato.data.batch import Cond
from sfumato.data.strategies import TextEncoderOutputsCachingStrategy
from sfumato.errors import UserError
from sfumato.families.sd3 import facts, names
from sfumato.families.sd3.control import CONTROL
from sfumato.families.sd3.facts import Completed, Options
from sfumato.families.sd3.net import HEAD_WIDTH, MMDiT, blocks, transformer_config
from sfumato.families.sd3.network_args import target_layer
from sfumato.families.sd3.positions import embedded, places, scaled
from sfumato.families.sd3.strategies import CLIPS, LATENTS, Sd3Encode, Sd3Tokenize, outputs
from sfumato.formats.dialect import Dialect
from sfumato.models.autoencoders import vae_component
from sfumato.models.base import Family, Models, NewFolder, SampleInfo, TokenizerSpec, encoder_rate
from sfumato.models.components import Checkpoint, Config, denoiser
from sfumato.models.encoders.clip import CLIP_TARGETS, ClipText, clip_component
from sfumato.models.encoders.t5 import EMBEDDING, T5_TARGETS, t5_component, trains_t5
from sfumato.models.encoders.tokenizers import clip_tokenizer, t5_home, t5_vocabulary
from sfumato.models.layers import Shapes
from sfumato.models.new_folder import flow_folder
from sfumato.tensors.flow import Flow, schedule
from sfumato.tensors.noise import Drawn, NoiseProcess
from sfumato.tensors.random import SampleRandom
from sfumato.tensors.shapes import per_sample

PASSTHROUGH = re.compile(r"text_encoders\.(clip_l|clip_g|t5xxl)\.logit_scale")
"""What ComfyUI writes into bundles besides the nets."""
PROJECTION = "text_projection.weight"
log = logging.getLogger(__name__)


# --- files ---


def transformer(shapes: Shapes, config: Config) -> MMDiT:
    """A net without values for tensors of these shapes. Errors: `UserError` for models that take more than an image and
    a text."""
    channels = shapes["x_embedder.proj.weight"][1]
    if channels != LATENTS.channels:
        raise UserError(
            f"the transformer takes {channels} channels, not {LATENTS.channels} (a model for filling or editing): not "
            "supported yet"
        )
    if config.get("attention_head_dim", HEAD_WIDTH) != HEAD_WIDTH:
        raise UserError(
            f"config.json: attention_head_dim is {config['attention_head_dim']}; only {HEAD_WIDTH} is supported"
        )
    return MMDiT.of(shapes)


COMPONENTS = (
    denoiser(
        transformer,
        names.transformer_keys,
        native="x_embedder.proj.weight",
        diffusers="pos_embed.proj.weight",
    ),
    clip_component(
        "clip_l", (names.CLIP_L,), "text_encoder", "quick_gelu", flag="clip_l", projected=True, bundled=False
    ),
    clip_component("clip_g", (names.CLIP_G,), "text_encoder_2", "gelu", flag="clip_g", projected=True, bundled=False),
    t5_component((names.T5,), "text_encoder_3"),
    vae_component((names.VAE,), facts.SCALE, facts.VAE_SHIFT, channels=LATENTS.channels),
)


def complete(options: FamilyOptions, source: Checkpoint) -> tuple[Completed, Checkpoint]:
    """The options completed from the files and with the recipe's own values.

    Errors: `UserError` for options of a T5 that is not there, and for encoders of other widths.
    """
    o, has_t5, wrong = Options.of(options), "t5xxl" in source.components, list[str]()
    asked = [
        name
        for name in ("apply_t5_attn_mask", "t5_dropout_rate", "train_t5xxl", "learning_rate_te3")
        if getattr(o, name)
    ]
    if asked and not has_t5:
        wrong.append(f"{asked[0]}: {source.path} holds no T5; name its file with t5xxl, or leave {asked[0]} out")
    shapes = source.components["denoiser"].shapes()
    if wrong or (wrong := _width_mismatches(shapes, source)):
        raise UserError(*wrong)
    shift = o.discrete_flow_shift if o.training_shift is None else o.training_shift
    values: dict[str, Any] = {
        **asdict(o),
        "weighting_scheme": facts.scheme(o),
        "discrete_flow_shift": shift,
        "training_shift": None,
    }
    count = len({name.split(".")[1] for name in shapes if name.startswith("joint_blocks.")})
    return Completed(**values, version=facts.version(shapes), blocks=count, has_t5=has_t5), _without_clips_own(source)


def _width_mismatches(shapes: Shapes, source: Checkpoint) -> list[str]:
    """A message for text encoders whose widths are not those that the transformer takes."""
    clips = [source.components[name].shapes() for name in CLIPS]
    tokens = "text_model.embeddings.token_embedding.weight"
    widths = [clip[tokens][1] for clip in clips]
    pooled = [clip.get(PROJECTION, (width,))[0] for clip, width in zip(clips, widths, strict=True)]
    # What the transformer's file lacks is reported when it is filled.
    y_width, expected = (shapes.get(name, (0, 0))[1] for name in ("y_embedder.mlp.0.weight", "context_embedder.weight"))
    wrong = []
    if y_width and sum(pooled) != y_width:
        wrong.append(
            f"clip_l, clip_g: their pooled states are {pooled[0]} and {pooled[1]} wide, the transformer takes "
            f"{y_width} of both: one is another CLIP"
        )
    elif widths[0] > widths[1]:
        wrong.append("clip_l, clip_g: the files are exchanged, as clip_l is the wider one")
    if t5 := source.components.get("t5xxl"):
        width = t5.shapes()[EMBEDDING][1]
        if expected and width != expected:
            wrong.append(f"t5xxl: its states are {width} wide, {expected} was expected: it is another T5")
    return wrong


def _without_clips_own(source: Checkpoint) -> Checkpoint:
    """CLIP-L's file without the projection that compares texts with images, which files for other uses hold.

    Stable Diffusion 3 takes what CLIP-L pools as it is: the projection in its own files is the identity, or near it
    where it was trained.
    """
    weights = source.components["clip_l"]
    projection = next((t for name, t in weights.natives() if name == PROJECTION), None) if weights.alone else None
    if projection is None or projection.diagonal().float().mean() > 0.5:
        return source
    log.warning(
        "clip_l: %s has CLIP's own projection, which Stable Diffusion 3 does not use; it is left out", weights.where
    )
    left = weights.tensors.only(lambda name: name not in (PROJECTION, "text_projection"))
    return replace(source, components={**source.components, "clip_l": replace(weights, tensors=left)})


def new_folder(models: Models) -> NewFolder | None:
    """What `StableDiffusion3Pipeline.from_pretrained` reads besides weights; it wants a projection of CLIP-L, which is
    the identity where its file has none."""
    transformer = transformer_config(cast(MMDiT, models.denoiser), "SD3Transformer2DModel")
    made = flow_folder(
        models, "StableDiffusion3Pipeline", transformer, {"shift": facts.SHIFT}, "CLIPTextModelWithProjection"
    )
    clip = cast(ClipText, models.encoders["clip_l"])
    if made is None or isinstance(clip.text_projection, nn.Linear):
        return made
    return replace(made, added={"clip_l": {PROJECTION: torch.eye(clip.config.hidden_size)}})


# --- running ---


def tokenize(models: Models) -> Sd3Tokenize:
    """Captions -> tokens."""
    o, tokenizers = Completed.of(models.options), models.tokenizers
    clips = {name: tokenizers[name] for name in CLIPS}
    return Sd3Tokenize(
        clips, tokenizers.get("t5xxl"), o.t5xxl_max_token_length, o.apply_lg_attn_mask, o.apply_t5_attn_mask
    )


def outputs_strategy(models: Models) -> TextEncoderOutputsCachingStrategy:
    """What is cached of captions."""
    o = Completed.of(models.options)
    return outputs(
        t5=o.has_t5, length=o.t5xxl_max_token_length, masked=o.apply_t5_attn_mask, masked_clips=o.apply_lg_attn_mask
    )


def process(models: Models, noise: NoiseConfig, loss: LossConfig) -> NoiseProcess:
    """Rectified flow."""
    return Flow.of(models.options, noise, shift=facts.SHIFT)


def draw(models: Models, sizes: Tensor, rng: SampleRandom) -> Drawn:
    """Which encoders' outputs are taken away, {"clip_l_dropped": (b,)}, and where images lie, if that may differ:
    {"crop": (b, 2)} in the table of positions, or {"scaled": (b, 3)} in one that fits their size."""
    net, o = cast(MMDiT, models.denoiser), Completed.of(models.options)
    rates = {"clip_l": o.clip_l_dropout_rate, "clip_g": o.clip_g_dropout_rate, "t5": o.t5_dropout_rate}
    drawn = {f"{name}_dropped": rng.uniform(f"{name} dropout") < rate for name, rate in rates.items() if rate}
    patches, rate = sizes[:, 4:] // LATENTS.multiple, o.pos_emb_random_crop_rate  # (b, 2) rows and columns
    if o.enable_scaled_pos_embed:
        drawn["scaled"] = scaled(patches, rate, rng)
    elif rate:
        drawn["crop"] = places(patches, net.side, rate, rng)
    return drawn


def condition(models: Models, cond: Cond, setting: SampleInfo) -> Cond:
    """{"context": (b, 77 + n, 4096), "y": (b, 2048)}: both CLIPs side by side and T5 below them, as
    StableDiffusion3Pipeline has it.

    While training also what was drawn of where images lie.
    """
    net, o = cast(MMDiT, models.denoiser), Completed.of(models.options)
    cond = _dropped(cond, setting.drawn)
    width = net.context_embedder.in_features
    clips = torch.cat([cond[name] for name in CLIPS], -1)
    if "t5" not in cond:  # as diffusers' pipeline has it
        t5 = clips.new_zeros(len(clips), o.t5xxl_max_token_length, width)
    elif "t5_mask" in cond:
        t5 = cond["t5"].masked_fill(~cond["t5_mask"][..., None], 0)
    else:
        t5 = cond["t5"]
    context = torch.cat([F.pad(clips, (0, width - clips.shape[-1])), t5], 1)
    y = torch.cat([cond[f"{name}_pooled"] for name in CLIPS], -1)
    return {"context": context, "y": y, **{name: t for name, t in setting.drawn.items() if name in ("crop", "scaled")}}


def _dropped(cond: Cond, drawn: Drawn) -> Cond:
    """The encoders' outputs, each zero for the samples that were drawn."""
    gone = {part: drawn.get(f"{part.removesuffix('_pooled')}_dropped") for part in cond}
    return {
        part: t if (each := gone[part]) is None else t.masked_fill(per_sample(each, t), 0) for part, t in cond.items()
    }


def predict(net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The velocity."""
    positions = None
    if "scaled" in cond:
        h, w = (n // LATENTS.patch for n in x.shape[-2:])
        positions = embedded(cond["scaled"], h, w, cast(MMDiT, net).pos_embed.shape[-1])
    prediction: Tensor = net(x, t, cond["context"], cond["y"], cond.get("crop"), positions)
    return prediction


def sigmas(models: Models, steps: int, latent_pixels: int, shift: float | None) -> Tensor:
    """The same for images of all sizes."""
    return schedule(steps, shift=shift)


def largest(models: Models) -> int:
    """The longest side of an image that there are positions for, in pixels."""
    return cast(MMDiT, models.denoiser).largest * LATENTS.stride


# --- training ---


def dialects(models: Models) -> Mapping[str, Dialect]:
    """Adapter names of a model with this transformer."""
    return names.dialects(models.denoiser.state_dict())


def trainable(options: FamilyOptions, plan: AdapterPlan | None) -> frozenset[str]:
    """T5 is trained only where it is asked for. Errors: `UserError` where there is none."""
    t5 = trains_t5(options, plan)
    if t5 and isinstance(options, Completed) and not options.has_t5:
        raise UserError("train_t5xxl: the model holds no T5; name its file with t5xxl, or leave train_t5xxl out")
    return frozenset({*CLIPS, "t5xxl"} if t5 else CLIPS)


def rate(options: FamilyOptions, component: str, path: str) -> float | None:
    """As of all text encoders; nothing for the queries of the text in the last block, which ends there."""
    if path == f"joint_blocks.{Completed.of(options).blocks - 1}.context_block.attn.ln_q.weight":
        return 0.0
    return encoder_rate(options, component, path)


def caption(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """For `Family.caption`; the pooled states of both CLIPs stand side by side, bigG's are the wider ones."""
    both = shapes["y_embedder.mlp.0.weight"][1]
    widths = {"clip_l": both * 3 // 8, "clip_g": both - both * 3 // 8}
    states = {name: (77, width) for name, width in widths.items()}
    pooled = {f"{name}_pooled": (width,) for name, width in widths.items()}
    return {**states, **pooled, "t5": (256, shapes["context_embedder.weight"][1])}


FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3 or 3.5",
    components=COMPONENTS,
    optional=frozenset({"t5xxl"}),
    passthrough_keys=PASSTHROUGH,
    complete=complete,
    tokenizer_specs={
        # CLIP's vocabulary comes with sfumato, so that a folder given for no more than a tokenizer is T5's.
        "clip_l": TokenizerSpec(folder="tokenizer", make=clip_tokenizer, alone=False),
        # CLIP-G was trained with captions padded by the token 0, which is "!".
        "clip_g": TokenizerSpec(folder="tokenizer_2", make=partial(clip_tokenizer, pad="!"), alone=False),
        "t5xxl": TokenizerSpec(folder="tokenizer_3", make=t5_vocabulary, home=t5_home),
    },
    new_folder=new_folder,
    tokenize=tokenize,
    encode=lambda models: Sd3Encode(),
    latents=LATENTS,
    outputs=outputs_strategy,
    process=process,
    draw=draw,
    condition=condition,
    caption=caption,
    predict=predict,
    sigmas=sigmas,
    largest=largest,
    blocks=blocks,
    dialects=dialects,
    targets={
        "denoiser": names.TARGETS,
        "clip_l": CLIP_TARGETS,
        "clip_g": CLIP_TARGETS,
        "t5xxl": T5_TARGETS,
    },
    target_layer=lambda options, plan, target: target_layer(getattr(options, "blocks", 0), plan, target),
    trainable=trainable,
    rate=rate,
    encoder_lr_order=("clip_l", "clip_g", "t5xxl"),
    control=CONTROL,
)
