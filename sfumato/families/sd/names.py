"""The names of Stable Diffusion's files: prefixes of the single file, tables to diffusers, tensors that belong to no
net."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sfumato.formats.names import KeyMap, Rule, rule

VAE = "first_stage_model."
CLIP_L = "cond_stage_model.transformer."
"""1.x: CLIP-L in transformers' names."""
CLIP_H = "cond_stage_model.model."
"""2.x: OpenCLIP-H in its own names."""

NO_NETS = (
    r"model_ema\..*"  # a training run's average of the U-Net
    r"|(alphas|betas|sqrt_|log_one|posterior_|lvlb_|logvar|scale_factor|global_step).*"  # the schedule, counters
    r"|(v_pred|ztsnr)"  # empty tensors by which some programs mark v prediction and a zero terminal SNR
    r"|denoiser\.sigmas|embedding_manager\..*"
    r"|first_stage_model\.(loss|discriminator|model_ema)\..*"  # what trained the VAE
)
"""Pattern of tensors that no net holds, apart from the text encoders' own."""
PASSTHROUGH = re.compile(
    NO_NETS + r"|cond_stage_model\.(transformer\.|model\.)?(text_model\.)?"
    r"(embeddings\.position_ids|logit_scale|text_projection(\.weight)?|attn_mask)"
    r"|cond_stage_model\.transformer\.(vision_model|visual_projection)\..*"
)
"""Full names of tensors that no net holds; they are copied from the source file on save."""

_RESNETS = ("*.in_layers.2", "*.emb_layers.1", "*.out_layers.3", "*.skip_connection")
_TRANSFORMERS = ("*.proj_in", "*.proj_out", "*.transformer_blocks.*")
UNET_TARGETS: Mapping[str, tuple[str, ...]] = {
    "linear": _TRANSFORMERS,
    "conv": (*_RESNETS, "*.op", "*.conv"),
    "attention": ("*.attn?.*",),
    "self_attention": ("*.attn1.*",),
    "cross_attention": ("*.attn2.*",),
    "mlp": ("*.ff.*",),
    "resnets": _RESNETS,
    "embedders": ("time_embed.*", "label_emb.*"),
    "ia3": ("*.to_k", "*.to_v", "*.ff.net.2"),
    # sd-scripts' classes, which LyCORIS' presets name.
    "Transformer2DModel": _TRANSFORMERS,
    "CrossAttention": ("*.attn?.*",),
    "FeedForward": ("*.ff.*",),
    "ResnetBlock2D": _RESNETS,
    "Downsample2D": ("*.op",),
    "Upsample2D": ("*.conv",),
}
"""Set of layers -> paths of a U-Net's layers. "linear" has adapters by default, "conv" with conv_dim."""
TARGETS: Mapping[str, tuple[str, ...]] = {
    **UNET_TARGETS,
    # LyCORIS' full preset has these as well; by other names in Stable Diffusion XL it does not find them.
    "ends": ("input_blocks.0.0", "out.2"),
    "time": ("time_embed.*",),
}
"""The same for 1.x and 2.x."""


@dataclass(frozen=True)
class Layout:
    """Where the parts of a U-Net stand: layers a level, and which levels have attention, the outermost level first."""

    layers: int
    attention: tuple[bool, ...]

    @classmethod
    def of(cls, names: Collection[str]) -> Layout:
        """Read off the tensors' names, native ones or diffusers'."""
        keys = set(names)
        if "input_blocks.0.0.weight" in keys:
            levels = 1 + sum(name.endswith(".op.weight") for name in keys)
            blocks = len({name.split(".")[1] for name in keys if name.startswith("input_blocks.")})
            layers = (blocks - levels) // levels
            return cls(
                layers,
                tuple(f"input_blocks.{1 + level * (layers + 1)}.1.norm.weight" in keys for level in range(levels)),
            )
        levels = len({name.split(".")[1] for name in keys if name.startswith("down_blocks.")})
        layers = len({name.split(".")[3] for name in keys if name.startswith("down_blocks.0.resnets.")})
        return cls(layers, tuple(f"down_blocks.{level}.attentions.0.norm.weight" in keys for level in range(levels)))


def unet_keys(names: Collection[str]) -> KeyMap:
    """native: LDM. foreign: diffusers' UNet2DConditionModel. For a net with tensors of these names, of either
    side."""
    layout = Layout.of(names)
    ends = [
        rule("time_embed.0", "time_embedding.linear_1"),
        rule("time_embed.2", "time_embedding.linear_2"),
        rule("input_blocks.0.0", "conv_in"),
        rule("out.0", "conv_norm_out"),
        rule("out.2", "conv_out"),
    ]
    middle = [
        *_resnet("middle_block.0", "mid_block.resnets.0"),
        rule("middle_block.1", "mid_block.attentions.0"),
        *_resnet("middle_block.2", "mid_block.resnets.1"),
    ]
    return KeyMap(*ends, *_way_down(layout), *middle, *_way_up(layout))


def _way_down(layout: Layout) -> list[Rule]:
    rules, last = [], len(layout.attention) - 1
    for level, attends in enumerate(layout.attention):
        first = 1 + level * (layout.layers + 1)
        for j in range(layout.layers):
            rules += _resnet(f"input_blocks.{first + j}.0", f"down_blocks.{level}.resnets.{j}")
            if attends:
                rules.append(rule(f"input_blocks.{first + j}.1", f"down_blocks.{level}.attentions.{j}"))
        if level < last:
            rules.append(rule(f"input_blocks.{first + layout.layers}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
    return rules


def _way_up(layout: Layout) -> list[Rule]:
    rules, last = [], len(layout.attention) - 1
    for up, attends in enumerate(reversed(layout.attention)):
        first = up * (layout.layers + 1)
        for j in range(layout.layers + 1):
            rules += _resnet(f"output_blocks.{first + j}.0", f"up_blocks.{up}.resnets.{j}")
            if attends:
                rules.append(rule(f"output_blocks.{first + j}.1", f"up_blocks.{up}.attentions.{j}"))
        if up < last:
            rules.append(
                rule(f"output_blocks.{first + layout.layers}.{1 + attends}.conv", f"up_blocks.{up}.upsamplers.0.conv")
            )
    return rules


def _resnet(native: str, foreign: str) -> list[Rule]:
    parts = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    return [rule(f"{native}.{n}", f"{foreign}.{f}") for n, f in parts.items()]
