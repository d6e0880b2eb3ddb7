"""diffusers folders of Stable Diffusion: what is required of their configs, and the configs of new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.families.sd.facts import Options
from sfumato.families.sd.names import Layout, unet_keys
from sfumato.families.sd.net import CONV_HEADS, LINEAR_HEAD_WIDTH
from sfumato.models.base import Models, NewFolder
from sfumato.models.components import Config
from sfumato.models.layers import Shapes
from sfumato.models.new_folder import index, text_config, vae_config
from sfumato.tensors.noise import DDPM

UNET_FACTS: dict[str, Any] = {
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "resnet_time_scale_shift": "default",
    "transformer_layers_per_block": 1,
}
"""Values of a config, if it has them, of the net that is ours."""
_MIDDLE = "mid_block.attentions.0.proj_in.weight"


def check_unet(config: Config, shapes: Shapes, facts: Mapping[str, Any] = UNET_FACTS) -> None:
    """Errors: `UserError` for each thing in which a U-Net's config asks for another net than these native shapes
    make."""
    if not config:
        return
    wrong = [
        f"config.json: {k} is {config[k]!r}; only {v!r} is supported" for k, v in facts.items() if config.get(k, v) != v
    ]
    foreign = _foreign(shapes)
    widths = _widths(foreign)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", CONV_HEADS)
    # diffusers calls the number of heads attention_head_dim here.
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * len(widths)
    expected = _heads(foreign, widths)
    if heads != expected:
        wrong.append(f"config.json: attention heads {heads}; for these widths only {expected} is supported")
    if wrong:
        raise UserError(*wrong)


def unet_config(shapes: Shapes, sample_size: int, facts: Mapping[str, Any] = UNET_FACTS) -> dict[str, Any]:
    """The config of diffusers' UNet2DConditionModel for a net with these native tensors."""
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(Layout.of(shapes).attention)]
    return {
        **half_config(shapes, facts),
        "_class_name": "UNet2DConditionModel",
        "out_channels": shapes["out.2.weight"][0],
        "up_block_types": up,
        "sample_size": sample_size,
    }


def half_config(shapes: Shapes, facts: Mapping[str, Any] = UNET_FACTS) -> dict[str, Any]:
    """What diffusers' configs of a U-Net and of a ControlNet have in common."""
    unet = _foreign(shapes)
    widths, layout = _widths(unet), Layout.of(unet)
    linear = unet[_MIDDLE].ndim == 2
    return {
        "in_channels": unet["conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": layout.layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in layout.attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": _heads(unet, widths) if linear else CONV_HEADS,
        "use_linear_projection": linear,
        **facts,
    }


def _foreign(shapes: Shapes) -> dict[str, Tensor]:
    """diffusers' names and shapes of a U-Net, without values."""
    return unet_keys(shapes).to_foreign({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def _widths(unet: Mapping[str, Tensor]) -> list[int]:
    """Channels of each level, from a U-Net in diffusers' names."""
    return [
        unet[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(len(Layout.of(unet).attention))
    ]


def _heads(unet: Mapping[str, Tensor], widths: list[int]) -> list[int]:
    # A ControlNet may have no transformers at all.
    linear = _MIDDLE not in unet or unet[_MIDDLE].ndim == 2
    return [width // LINEAR_HEAD_WIDTH if linear else CONV_HEADS for width in widths]


def new_folder(models: Models) -> NewFolder:
    """What `StableDiffusionPipeline.from_pretrained` reads besides weights. A source folder's safety checker is not
    copied."""
    ((name, encoder),) = models.encoders.items()
    o = Options.of(models.options)
    v = o.v_parameterization
    shapes = {n: tuple(t.shape) for n, t in models.denoiser.state_dict().items()}
    present = {
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
    }
    absent = {"feature_extractor", "image_encoder", "safety_checker"}
    configs = {
        "denoiser": unet_config(shapes, 96 if o.v2 and v else 64),
        name: text_config(encoder),
    }
    if models.vaes is None:
        absent.add("vae")
    else:
        present["vae"] = ("diffusers", "AutoencoderKL")
        configs["vae"] = vae_config(models.vae)
    scheduler = {"_class_name": "DDIMScheduler", **DDPM(prediction="v" if v else "eps").scheduler_config()}
    return NewFolder(
        index={**index("StableDiffusionPipeline", present, absent), "requires_safety_checker": False},
        configs=configs,
        scheduler=scheduler,
    )
