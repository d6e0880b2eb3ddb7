"""The record of HunyuanImage-2.1: where its nets stand in files, and how they are run and adapted."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.config import FamilyOptions, LossConfig, NoiseConfig
from sfumato.data.batch import Cond
from sfumato.errors import UserError
from sfumato.families.hunyuan_image import facts
from sfumato.families.hunyuan_image.facts import BYT5, PREFIXES, QWEN, SHIFT, VAE, Completed, Options
from sfumato.families.hunyuan_image.names import COMFY, TARGETS, transformer_keys
from sfumato.families.hunyuan_image.net import HunyuanImage, blocks
from sfumato.families.hunyuan_image.network_args import target_layer
from sfumato.families.hunyuan_image.strategies import LATENTS, OUTPUTS, HunyuanEncode, HunyuanTokenize
from sfumato.formats.dialect import Dialect, usual
from sfumato.models.base import T_NEXT, Family, Models, NewFolder, SampleInfo, TokenizerSpec
from sfumato.models.components import Checkpoint, Config, check_config, denoiser
from sfumato.models.encoders.llm import qwen25vl_component
from sfumato.models.encoders.t5 import EMBEDDING, byt5_component
from sfumato.models.encoders.tokenizers import byt5_home, byt5_vocabulary, qwen_home, qwen_vocabulary
from sfumato.models.hunyuan_vae import hunyuan_vae_component
from sfumato.models.key_formats import NATIVE, KeyFormat
from sfumato.models.layers import Shapes, numbered
from sfumato.models.new_folder import flow_folder
from sfumato.tensors.flow import Flow, schedule
from sfumato.tensors.guidance import Guidance, GuidanceInfo, ProjectedMix
from sfumato.tensors.noise import NoiseProcess

PASSTHROUGH = re.compile(r"text_encoders\.(qwen25_7b|byt5_small)\.(logit_scale|text_projection(\.weight)?)")
"""What ComfyUI writes into bundles besides the nets."""
_GUIDER = "AdaptiveProjectedMixGuidance"
log = logging.getLogger(__name__)


# --- files ---


def transformer(shapes: Shapes, config: Config) -> HunyuanImage:
    """A net without values for tensors of these shapes. Errors: `UserError` if its config asks for another."""
    net = HunyuanImage.of(shapes)
    check_config(
        config,
        {
            "patch_size": [1, 1],
            "rope_axes_dim": list(net.axes),
            "rope_theta": net.theta,
            "guidance_embeds": net.guidance_in is not None,
            "use_meanflow": net.time_r_in is not None,
        },
    )
    return net


def key_format(shapes: Shapes) -> KeyFormat | None:
    """Tencent's names, ComfyUI's, or diffusers'."""
    formats = {
        "native": NATIVE,
        "comfy": KeyFormat("comfy", COMFY),
        "diffusers": KeyFormat("diffusers", transformer_keys(shapes)),
    }
    return next((formats[name] for name, mark in facts.ATTENTION.items() if mark in shapes), None)


COMPONENTS = (
    replace(
        denoiser(
            transformer,
            transformer_keys,
            prefixes=PREFIXES,
            native=facts.ATTENTION["native"],
            diffusers=facts.ATTENTION["diffusers"],
        ),
        key_format=key_format,
    ),
    qwen25vl_component((QWEN,), "text_encoder"),
    byt5_component((BYT5,), "text_encoder_2"),
    hunyuan_vae_component((VAE,)),
)


def complete(options: FamilyOptions, source: Checkpoint) -> tuple[Completed, Checkpoint]:
    """The variant and the number of blocks, from the file. Errors: `UserError` for a guidance that the model does not
    take, and for encoders of other widths."""
    o, shapes = Options.of(options), source.components["denoiser"].shapes()
    variant, wrong = facts.variant(shapes), _width_mismatches(shapes, source)
    if variant == "base" and o.guidance_scale is not None:
        wrong.append(f"guidance_scale: {source.path} is the base model, which takes no guidance; leave it out")
    if wrong:
        raise UserError(*wrong)
    guidance = facts.GUIDANCE if o.guidance_scale is None else o.guidance_scale
    values: dict[str, Any] = {**asdict(o), "guidance_scale": None if variant == "base" else guidance}
    values |= {name: len(numbered(shapes, name)) for name in ("double_blocks", "single_blocks")}
    return Completed(**values, variant=variant), source


def _width_mismatches(shapes: Shapes, source: Checkpoint) -> list[str]:
    """A message for each text encoder whose states have another width than the transformer takes."""
    # What the transformer's file lacks is reported when it is filled.
    wanted = {
        "qwen25vl": ("text_encoder", "embed_tokens.weight", shapes.get("txt_in.input_embedder.weight", (0, 0))[1]),
        "byt5": ("byt5", EMBEDDING, shapes.get("byt5_in.fc1.weight", (0, 0))[1]),
    }
    found = {name: source.components[name].shapes()[tokens][1] for name, (_, tokens, _) in wanted.items()}
    return [
        f"{flag}: its states are {found[name]} wide, the transformer takes {width}: it is another model's text encoder"
        for name, (flag, _, width) in wanted.items()
        if width and found[name] != width
    ]


def new_folder(models: Models) -> NewFolder | None:
    """What `HunyuanImagePipeline.from_pretrained` reads besides weights."""
    net = cast(HunyuanImage, models.denoiser)
    width, head = net.txt_in.input_embedder.out_features, sum(net.axes)
    transformer = {
        "_class_name": "HunyuanImageTransformer2DModel",
        "in_channels": LATENTS.channels,
        "out_channels": LATENTS.channels,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": len(net.double_blocks),
        "num_single_layers": len(net.single_blocks),
        "num_refiner_layers": len(net.txt_in.blocks),
        "patch_size": [1, 1],
        "guidance_embeds": net.guidance_in is not None,
        "use_meanflow": net.time_r_in is not None,
        "text_embed_dim": net.txt_in.input_embedder.in_features,
        "text_embed_2_dim": net.byt5_in.fc1.in_features,
        "rope_axes_dim": list(net.axes),
        "rope_theta": net.theta,
    }
    made = flow_folder(models, "HunyuanImagePipeline", transformer, {"shift": SHIFT})
    if made is None or Completed.of(models.options).variant == "distilled":
        return made
    starts = {"guider": facts.APG_START, "ocr_guider": facts.APG_START_OCR}
    return replace(
        made,
        index={**made.index, **{name: ["diffusers", _GUIDER] for name in starts}},
        files={
            f"{name}/guider_config.json": {
                "_class_name": _GUIDER,
                "guidance_scale": facts.SCALE,
                "adaptive_projected_guidance_start_step": start,
            }
            for name, start in starts.items()
        },
    )


# --- running ---


def tokenize(models: Models) -> HunyuanTokenize:
    """Captions -> tokens."""
    return HunyuanTokenize(models.tokenizers["qwen25vl"], models.tokenizers["byt5"])


def process(models: Models, noise: NoiseConfig, loss: LossConfig) -> NoiseProcess:
    """Rectified flow."""
    return Flow.of(models.options, noise, shift=SHIFT)


def condition(models: Models, cond: Cond, setting: SampleInfo) -> Cond:
    """Adds the guidance where the model takes one."""
    guidance, text = Completed.of(models.options).guidance_scale, cond["text"]
    if guidance is not None:
        common = torch.full((len(text),), guidance, device=text.device)
        return {**cond, "guidance": common if setting.guidance is None else setting.guidance}
    if setting.guidance is not None and bool((setting.guidance != facts.SAMPLE_GUIDANCE).any()):
        log.warning("guidance_scale (--g) has no effect: this is the base model, which is guided by scale (--l)")
    return cond


def predict(net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The velocity; of a distilled model its mean until the sampler's next step, in training that at x."""
    masks = cond.get("text_mask"), cond.get("glyphs_mask")
    velocity: Tensor = net(x, t, cond["text"], cond["glyphs"], *masks, cond.get("guidance"), cond.get(T_NEXT))
    return velocity


def sigmas(models: Models, steps: int, latent_pixels: int, shift: float | None) -> Tensor:
    """The same for images of all sizes."""
    return schedule(steps, mu=math.log(shift or SHIFT))


class Unguided:
    """A distilled model's predictions are guided already."""

    def uses_negative(self, step: int) -> bool:
        """Never."""
        return False

    def combine(self, positive: Tensor, negative: Tensor, step: int) -> Tensor:
        """The prediction for the prompt."""
        return positive


def guidance(models: Models, info: GuidanceInfo) -> Guidance:
    """Adaptive projected guidance after the first steps; later where the image is to show text."""
    if Completed.of(models.options).variant == "distilled":
        if bool((info.scale != facts.SCALE).any()):
            log.warning("scale (--l) has no effect: the distilled model takes guidance_scale (--g)")
        return Unguided()
    glyphs, values = info.cond["glyphs"], info.values
    mask = info.cond.get("glyphs_mask", torch.ones(glyphs.shape[:2], dtype=torch.bool, device=glyphs.device))
    starts = (values["apg_start_step_ocr"], values["apg_start_step_general"])
    return ProjectedMix(
        info.scale,
        torch.where(mask.any(1), *starts).view(-1, 1, 1, 1),
        guidance_rescale=values["guidance_rescale"],
        guidance_rescale_apg=values["guidance_rescale_apg"],
    )


# --- training ---


def dialects(models: Models) -> Mapping[str, Dialect]:
    """Adapter names: kohya's are built on Tencent's names, ComfyUI's on its own, PEFT's on diffusers'."""
    keys = transformer_keys({name: tuple(t.shape) for name, t in models.denoiser.state_dict().items()})
    found = usual(
        {"denoiser": "lora_unet_"}, {"denoiser": "diffusion_model."}, {"denoiser": "transformer."}, {"denoiser": keys}
    )
    return {**found, "comfy": replace(found["comfy"], keys={"denoiser": COMFY})}


FAMILY = Family(
    name="hunyuan_image",
    title="HunyuanImage-2.1",
    components=COMPONENTS,
    passthrough_keys=PASSTHROUGH,
    complete=complete,
    tokenizer_specs={
        "qwen25vl": TokenizerSpec(folder="tokenizer", make=qwen_vocabulary, home=qwen_home),
        "byt5": TokenizerSpec(folder="tokenizer_2", make=byt5_vocabulary, home=byt5_home, alone=False),
    },
    wordless=frozenset({"byt5"}),
    new_folder=new_folder,
    tokenize=tokenize,
    encode=lambda models: HunyuanEncode(),
    latents=LATENTS,
    outputs=lambda models: OUTPUTS,
    process=process,
    condition=condition,
    caption=lambda shapes: {
        "text": (128, shapes["txt_in.input_embedder.weight"][1]),
        "glyphs": (32, shapes["byt5_in.fc1.weight"][1]),
    },
    predict=predict,
    sigmas=sigmas,
    guidance=guidance,
    blocks=blocks,
    dialects=dialects,
    targets={"denoiser": TARGETS},
    target_layer=target_layer,
    trainable=lambda options, plan: frozenset(),
)
