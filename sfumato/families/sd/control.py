"""ControlNets of models with a U-Net: its way down once more, with an image (arXiv:2302.05543)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.config import FamilyOptions
from sfumato.errors import UserError
from sfumato.families.sd.folder import check_unet, half_config
from sfumato.families.sd.names import unet_keys
from sfumato.families.sd.net import UNetBase, WayDown, conv
from sfumato.formats.names import KeyMap, rule
from sfumato.models.components import Component, Config
from sfumato.models.control import FLAG, ControlSpec, Door
from sfumato.models.key_formats import NATIVE, KeyFormat, native_format
from sfumato.models.layers import Shapes, numbered

HINT_CHANNELS = (3, 16, 16, 32, 32, 96, 96, 256)
"""What passes between the convolutions that the image goes through; every second one from the third on halves it."""
HINT = "input_hint_block"
LAST_HINT = f"{HINT}.{2 * (len(HINT_CHANNELS) - 1)}"
ZEROS = rf"(zero_convs\.\d+\.0|middle_block_out\.0|{re.escape(LAST_HINT)})\.(weight|bias)"
OWN = rf"({HINT}|zero_convs|middle_block_out)\..*"
"""Whole names of what a U-Net has not."""
FACTS: Mapping[str, Any] = {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}
"""Values of a config, if it has them, besides those of the U-Net."""
ABSENT = ("center_input_sample", "dual_cross_attention")
"""Of a U-Net's config, what a ControlNet's has not."""


class ControlBase(WayDown):
    """A U-Net's way down with an image, and a door for each block; a family's net makes the embedding."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        layers: list[nn.Module] = []
        for i in range(len(HINT_CHANNELS)):
            layers += [conv(shapes, f"{HINT}.{2 * i}", stride=2 if i in (2, 4, 6) else 1), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*layers[:-1])
        # The names have one more number than the layers need.
        self.zero_convs = nn.ModuleList(nn.Sequential(conv(shapes, f"{n}.0")) for n in numbered(shapes, "zero_convs"))
        self.middle_block_out = nn.Sequential(conv(shapes, "middle_block_out.0"))

    def forward_blocks(self, x: Tensor, emb: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """x (b, 4, h, w), emb (b, e), context (b, n, d), hint (b, 3, 8h, 8w) in [0, 1] -> one for each input block, as
        its output is shaped, and one for the middle."""
        residuals = []
        for i, (block, door) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            x = block(x, emb, context)
            if i == 0:
                x = x + self.input_hint_block(hint)
            residuals.append(door(x))
        x = self.middle_block(x, emb, context)
        return [*residuals, self.middle_block_out(x)]


class ControlNet(ControlBase):
    """Of Stable Diffusion 1.x and 2.x."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *, hint: Tensor) -> list[Tensor]:
        """x (b, 4, h, w), t (b,), context (b, n, d), hint (b, 3, 8h, 8w) in [0, 1] -> see `forward_blocks`."""
        return self.forward_blocks(x, self.time(t, x.dtype), context, hint)


def control_keys(unet: Callable[[Collection[str]], KeyMap], names: Collection[str]) -> KeyMap:
    """native: LDM, as the first ControlNets. foreign: diffusers' ControlNetModel. For a net with tensors of these
    names, of either side; `unet`: the table of the family's U-Net."""
    inner = [rule(f"{HINT}.{2 * i + 2}", f"controlnet_cond_embedding.blocks.{i}") for i in range(6)]
    return KeyMap(
        *unet(names).rules,
        rule(f"{HINT}.0", "controlnet_cond_embedding.conv_in"),
        *inner,
        rule(LAST_HINT, "controlnet_cond_embedding.conv_out"),
        rule("zero_convs.{i}.0", "controlnet_down_blocks.{i}"),
        rule("middle_block_out.0", "controlnet_mid_block"),
    )


def control_shapes(unet: Shapes, options: FamilyOptions) -> Shapes:
    """A U-Net's tensors -> those of a new ControlNet of it."""
    copied = {n: s for n, s in unet.items() if not n.startswith(("output_blocks.", "out."))}
    outs = _widths(unet)
    channels = [*HINT_CHANNELS, outs[0]]
    own = {f"{HINT}.{2 * i}": (out, into, 3, 3) for i, (into, out) in enumerate(pairwise(channels))}
    own |= {f"zero_convs.{i}.0": (width, width, 1, 1) for i, width in enumerate(outs)}
    own["middle_block_out.0"] = (outs[-1], outs[-1], 1, 1)
    made = {f"{name}.weight": shape for name, shape in own.items()}
    return {**copied, **made, **{f"{name}.bias": shape[:1] for name, shape in own.items()}}


def _widths(unet: Shapes) -> list[int]:
    """Channels that each input block gives: its last layer's rows."""
    last = ("0", "0.op", "0.out_layers.3")
    return [
        next(unet[name][0] for layer in last if (name := f"{block}.{layer}.weight") in unet)
        for block in numbered(unet, "input_blocks")
    ]


def doors(denoiser: nn.Module, net: nn.Module) -> Sequence[Door]:
    """A residual onto each skip, where an output block takes it, and one behind the middle."""
    unet, control = cast(UNetBase, denoiser), cast(ControlBase, net)
    count = len(unet.output_blocks)
    if len(control.zero_convs) != count:
        raise UserError(
            f"{FLAG}: the ControlNet has {len(control.zero_convs)} outputs, but the U-Net takes {count}: it is for "
            "another model"
        )
    middle = Door(module=unet.middle_block, residual=count, add=lambda output, residual: output + residual)
    skips = [
        Door(module=block, residual=count - 1 - i, add=_onto_skip, before=True)
        for i, block in enumerate(unet.output_blocks)
    ]
    return [middle, *skips]


def _onto_skip(args: tuple[Any, ...], residual: Tensor) -> tuple[Any, ...]:
    """An output block's arguments; the skip is the last of the channels of its first."""
    x, *others = args
    return x + F.pad(residual, (0, 0, 0, 0, x.shape[1] - residual.shape[1], 0)), *others


def spec(
    net: type[ControlBase],
    keys: Callable[[Collection[str]], KeyMap],
    check: Callable[[Config, Shapes], None],
    half: Callable[[Shapes], Config],
    *,
    ldm: bool,
) -> ControlSpec:
    """ControlNets of a family with a U-Net, whose names in files are LDM's or diffusers'; `ldm`: which, of a new one.
    `keys`, `check`, `half`: the U-Net's table of names, and of what its config and a ControlNet's have in common."""

    def diffusers(shapes: Shapes) -> KeyFormat:
        return KeyFormat("diffusers", control_keys(keys, shapes))

    def known(shapes: Shapes) -> KeyFormat | None:
        if "controlnet_cond_embedding.conv_in.weight" in shapes:
            return diffusers(shapes)
        return NATIVE if f"{HINT}.0.weight" in shapes else None

    def make(shapes: Shapes, config: Config) -> nn.Module:
        check(config, _of_unet(shapes))
        if wrong := {name: config[name] for name, value in FACTS.items() if config.get(name, value) != value}:
            raise UserError(f"config.json: {wrong}; only {FACTS} is supported")
        return net.of(shapes)

    def config(shapes: Shapes) -> Config:
        found = {name: value for name, value in half(_of_unet(shapes)).items() if name not in ABSENT}
        return {"_class_name": "ControlNetModel", **found, **FACTS}

    component = Component(
        name="controlnet", title="the ControlNet", prefixes=("control_model.", "") if ldm else ("", "control_model."),
        folder="controlnet", flag=FLAG, net=make, key_format=known, single=native_format if ldm else diffusers,
        diffusers=diffusers,
    )  # fmt: skip
    return ControlSpec(
        component=component, shapes=control_shapes, zero=lambda shapes: ZEROS, doors=doors, config=config,
        blocks=lambda net: [*list(cast(ControlBase, net).input_blocks)[1:], cast(ControlBase, net).middle_block],
    )  # fmt: skip


def _of_unet(shapes: Shapes) -> Shapes:
    """Those that a U-Net has as well."""
    return {name: shape for name, shape in shapes.items() if not re.fullmatch(OWN, name)}


CONTROL = spec(ControlNet, unet_keys, check_unet, half_config, ldm=True)
