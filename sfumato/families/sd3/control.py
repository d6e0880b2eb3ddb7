"""Control nets of Stable Diffusion 3 and 3.5: its first blocks, which take the latents of an image besides (InstantX
2024, diffusers' SD3ControlNetModel)."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sfumato.config import FamilyOptions
from sfumato.errors import UserError
from sfumato.families.sd3.facts import SCALE, VAE_SHIFT, Options
from sfumato.families.sd3.names import control_keys
from sfumato.families.sd3.net import HEAD_WIDTH, Crop, MMDiT, MMDiTBase, blocks, patch_embedder, transformer_config
from sfumato.models.components import Component, Config, check_config
from sfumato.models.control import FLAG, ControlSpec, Door
from sfumato.models.key_formats import NATIVE, KeyFormat
from sfumato.models.layers import Shapes, linear, numbered


class MMDiTControlNet(MMDiTBase):
    """What `MMDiT` takes, and hint (b, 16, h, w) -> for each block (b, m, c), which is added to tokens of the image."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, ends=False)
        self.pos_embed_input = nn.Sequential(OrderedDict(proj=patch_embedder(shapes, "pos_embed_input.proj")))
        self.controlnet_blocks = nn.ModuleList(linear(shapes, name) for name in numbered(shapes, "controlnet_blocks"))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        crop: Crop | None = None,
        positions: Tensor | None = None,
        *,
        hint: Tensor,
    ) -> list[Tensor]:
        """As of `MMDiT`; hint: latents shaped as x. Diffusers' pipeline and ComfyUI run such nets without the pooled
        text, and leave the VAE's shift out of these latents."""
        hint = self.pos_embed_input(hint + VAE_SHIFT * SCALE)
        z = self.tokens(x, crop, positions) + hint.flatten(2).transpose(1, 2)
        states = self.states(z, context, self.embed(t, torch.zeros_like(y), x.dtype))
        return [door(state) for door, state in zip(self.controlnet_blocks, states, strict=True)]


# --- files ---

INPUT = "pos_embed_input.proj"
AS_RUN = {"force_zeros_for_pooled_projection": True}
"""In diffusers' config: that a net is run without the pooled text, and with latents without the VAE's shift."""


def control_net(shapes: Shapes, config: Config) -> MMDiTControlNet:
    """A net without values for tensors of these shapes. Errors: `UserError` for one that takes more than an image, or
    whose config asks for another."""
    given, expected = (shapes[f"{name}.weight"][1] for name in (INPUT, "x_embedder.proj"))
    if given != expected:
        raise UserError(
            f"it takes {given} channels of the image to follow, not {expected} (for filling, which needs a mask "
            "besides): not supported"
        )
    check_config(config, {"attention_head_dim": HEAD_WIDTH, **AS_RUN})
    return MMDiTControlNet.of(shapes)


def control_config(net: MMDiTControlNet) -> Config:
    """What diffusers' SD3ControlNetModel has in its config of a net like this one."""
    return {**transformer_config(net, "SD3ControlNetModel"), "extra_conditioning_channels": 0, **AS_RUN}


def control_shapes(shapes: Shapes, options: FamilyOptions) -> Shapes:
    """The tensors of a transformer -> those of a new control net of its first blocks. Errors: `UserError` if it is to
    have the last one, in which the text ends."""
    count = len(numbered(shapes, "joint_blocks"))
    depth = Options.of(options).controlnet_blocks or count // 2
    if depth >= count:
        raise UserError(f"controlnet_blocks: {depth}; of this model {count - 1} can be copied")
    kept = rf"pos_embed|[a-z]+_embedder\..*|joint_blocks\.({'|'.join(map(str, range(depth)))})\..*"
    patches = shapes["x_embedder.proj.weight"]
    own = {INPUT: patches, **{f"controlnet_blocks.{i}": (patches[0], patches[0]) for i in range(depth)}}
    return {
        **{name: shape for name, shape in shapes.items() if re.fullmatch(kept, name)},
        **{f"{name}.weight": shape for name, shape in own.items()},
        **{f"{name}.bias": shape[:1] for name, shape in own.items()},
    }


def diffusers(shapes: Shapes) -> KeyFormat:
    """diffusers' names, in which other programs look for these nets in single files as well."""
    return KeyFormat("diffusers", control_keys())


def key_format(shapes: Shapes) -> KeyFormat | None:
    """See `Component.key_format`."""
    if f"{INPUT}.weight" not in shapes:
        return None
    if "transformer_blocks.0.attn.add_q_proj.weight" in shapes:
        return diffusers(shapes)
    if "joint_blocks.0.x_block.attn.qkv.weight" in shapes:
        return NATIVE
    raise UserError("its blocks do not see the text (as of Stability's own nets for 3.5 large): not supported")


# --- at work ---


def doors(denoiser: nn.Module, net: nn.Module) -> Sequence[Door]:
    """The residuals onto tokens of the image after each block but the last, each for as many blocks in a row."""
    base, control = cast(MMDiT, denoiser), cast(MMDiTControlNet, net)
    given, width = (each.pos_embed.shape[-1] for each in (control, base))
    if given != width:
        raise UserError(f"{FLAG}: its blocks are {given} wide, the model's {width}: it is for another model")
    each = len(base.joint_blocks) / len(control.controlnet_blocks)
    return [
        Door(module=block, residual=int(i / each), add=_onto_image) for i, block in enumerate(base.joint_blocks[:-1])
    ]


def unused(net: nn.Module) -> str:
    """What becomes of the text in the last block, which is the end of it."""
    last = len(cast(MMDiTControlNet, net).joint_blocks) - 1
    return rf"joint_blocks\.{last}\.context_block\.(mlp|attn\.(proj|ln_q))\..*"


def _onto_image(output: tuple[Tensor, Tensor], residual: Tensor) -> tuple[Tensor, Tensor]:
    context, x = output
    return context, x + residual


CONTROL = ControlSpec(
    component=Component(
        name="controlnet",
        title="the ControlNet",
        folder="controlnet",
        flag=FLAG,
        net=control_net,
        key_format=key_format,
        single=diffusers,
        diffusers=diffusers,
    ),
    shapes=control_shapes,
    zero=lambda shapes: r"(controlnet_blocks|pos_embed_input)\..*",
    doors=doors,
    blocks=blocks,
    unused=unused,
    takes_latents=lambda net: True,
    config=lambda shapes: control_config(MMDiTControlNet.of(shapes)),
)
