"""Control nets of FLUX.1: its first blocks, which take an image besides.

The image comes as pixels, through a few convolutions (XLabs 2024, github.com/XLabs-AI/x-flux), or as latents of the VAE
(InstantX 2024, diffusers' FluxControlNetModel).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from sfumato.config import FamilyOptions
from sfumato.errors import UserError
from sfumato.families.flux.facts import SAMPLE_GUIDANCE, ControlOptions
from sfumato.families.flux.names import control_keys
from sfumato.families.flux.net import (
    PATCH,
    FluxBase,
    FluxTrunk,
    Modulation,
    blocks,
    embed,
    embedder,
    guidance_embedder,
    pack,
    patches,
    transformer_config,
)
from sfumato.models.components import Component, Config, check_config
from sfumato.models.control import FLAG, ControlSpec, Door
from sfumato.models.key_formats import NATIVE, KeyFormat
from sfumato.models.layers import Shapes, linear, modulation, numbered

HINT_WIDTH, HINT_STRIDES = 16, (1, 1, 2, 1, 2, 1, 2, 1)
"""Channels and steps of the convolutions from pixels to something shaped as latents."""
HINT = "input_hint_block"
DOORS = {"double_blocks": "controlnet_blocks", "single_blocks": "controlnet_single_blocks"}
"""Blocks -> what their states go out by."""
INPUTS = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in")


class ControlTrunk(FluxTrunk):
    """What control nets of FLUX and of Chroma share: all but where the modulation comes from."""

    def __init__(self, shapes: Shapes, modulation: Modulation) -> None:
        super().__init__(shapes, modulation)
        self.input_hint_block = hint_block(shapes) if f"{HINT}.0.weight" in shapes else None
        self.pos_embed_input = linear(shapes, "pos_embed_input")
        self.controlnet_blocks, self.controlnet_single_blocks = (
            nn.ModuleList(linear(shapes, name) for name in numbered(shapes, doors)) for doors in DOORS.values()
        )

    def residuals(
        self,
        x: Tensor,
        context: Tensor,
        double: Iterable[tuple[Tensor, Tensor]],
        single: Iterable[Tensor],
        mask: Tensor | None,
        hint: Tensor,
    ) -> list[Tensor]:
        """As of `FluxBase.forward_blocks`; hint: pixels (b, 3, H, W) in [0, 1] or latents shaped as x -> for each
        block (b, m, c)."""
        hint = hint if self.input_hint_block is None else self.input_hint_block(2 * hint - 1)
        size, img = patches(x), self.img_in(pack(x)) + self.pos_embed_input(pack(hint))
        states = self.states(img, context, size, double, single, mask)
        return [door(state) for door, state in zip(self.doors(), states, strict=True)]

    def doors(self) -> Sequence[nn.Module]:
        """One for each block, in forward order."""
        return [*self.controlnet_blocks, *self.controlnet_single_blocks]


class FluxControlNet(ControlTrunk):
    """What `Flux` takes, and hint (b, ...) -> for each block (b, m, c), which is added to tokens of the image."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, modulation)
        self.time_in, self.vector_in = embedder(shapes, "time_in"), embedder(shapes, "vector_in")
        self.guidance_in = guidance_embedder(shapes)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        hint: Tensor,
    ) -> list[Tensor]:
        """As of `Flux` and `ControlTrunk.residuals`. A net made for dev is told dev's usual guidance where the model
        is schnell, which takes none."""
        if guidance is None and self.guidance_in is not None:
            guidance = torch.full_like(t, SAMPLE_GUIDANCE)
        vec = embed(self, t, y, guidance, x.dtype)
        return self.residuals(
            x, context, [(vec, vec)] * len(self.double_blocks), [vec] * len(self.single_blocks), mask, hint
        )


def hint_block(shapes: Shapes) -> nn.Sequential:
    """Pixels (b, 3, H, W) -> (b, 16, H / 8, W / 8)."""
    layers: list[nn.Module] = []
    for i, stride in enumerate(HINT_STRIDES):
        out, into, kernel, _ = shapes[f"{HINT}.{2 * i}.weight"]
        layers += [nn.Conv2d(into, out, kernel, stride=stride, padding=kernel // 2), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


# --- files ---


def control_net(shapes: Shapes, config: Config) -> FluxControlNet:
    """A net without values for tensors of these shapes. Errors: `UserError` for one that takes more than an image, or
    whose config asks for another."""
    net = FluxControlNet.of(shapes)
    check_inputs(net)
    check_config(config, flux_config(net))
    return net


def check_inputs(net: ControlTrunk) -> None:
    """Errors: `UserError` for a net that takes more than an image."""
    given, expected = net.pos_embed_input.in_features, net.img_in.in_features
    if given != expected:
        raise UserError(
            f"it takes {given} channels a patch of the image to follow, not {expected} (for filling, which needs a "
            "mask besides): not supported"
        )


def flux_config(net: FluxControlNet) -> Config:
    """What diffusers' FluxControlNetModel has in its config of a net like this one."""
    latents = net.input_hint_block is None
    return {
        **transformer_config(net, "FluxControlNetModel"),
        # Of the image: convolutions give latents, which are cut into patches; latents come in patches.
        "patch_size": 1 if latents else PATCH,
        "pooled_projection_dim": cast(nn.Linear, net.vector_in.in_layer).in_features,
        "guidance_embeds": net.guidance_in is not None,
        "conditioning_embedding_channels": None if latents else HINT_WIDTH,
        "num_mode": None,
    }


def control_shapes(shapes: Shapes, options: FamilyOptions) -> Shapes:
    """The tensors of a transformer -> those of a new control net of its first blocks. Errors: `UserError` if it is to
    have more of them."""
    o = ControlOptions.of(options)
    depths = {"double_blocks": o.controlnet_double_blocks, "single_blocks": o.controlnet_single_blocks}
    for kind, depth in depths.items():
        if depth > (most := len(numbered(shapes, kind))):
            raise UserError(f"controlnet_{kind}: {depth}; the model has {most}")
    width, patch = shapes["img_in.weight"]
    own: dict[str, tuple[int, ...]] = {"pos_embed_input": (width, patch)}
    own |= {f"{DOORS[kind]}.{i}": (width, width) for kind, depth in depths.items() for i in range(depth)}
    if not o.controlnet_latents:
        channels = (3, *[HINT_WIDTH] * len(HINT_STRIDES))
        own |= {f"{HINT}.{2 * i}": (out, into, 3, 3) for i, (into, out) in enumerate(pairwise(channels))}

    def copied(name: str) -> bool:
        kind, number, *_ = name.split(".")
        return int(number) < depths[kind] if kind in depths else kind in INPUTS

    return {
        **{name: shape for name, shape in shapes.items() if copied(name)},
        **{f"{name}.weight": shape for name, shape in own.items()},
        **{f"{name}.bias": shape[:1] for name, shape in own.items()},
    }


def zeros(shapes: Shapes) -> str:
    """Of a new net: its doors, and the last layer before the image meets the latents; of a layer behind that one, which
    learns from it, the bias."""
    last = f"{HINT}.{2 * len(HINT_STRIDES) - 2}"
    given = rf"{re.escape(last)}\..*|pos_embed_input\.bias" if f"{last}.weight" in shapes else r"pos_embed_input\..*"
    return rf"controlnet_(single_)?blocks\..*|{given}"


def control_component(net: Callable[[Shapes, Config], nn.Module]) -> Component:
    """Control nets in files: those that take pixels in XLabs' and sd-scripts' names, those that take latents in
    diffusers', as other programs look for them; a diffusers folder may hold both."""

    def diffusers(shapes: Shapes) -> KeyFormat:
        return KeyFormat("diffusers", control_keys(shapes))

    def known(shapes: Shapes) -> KeyFormat | None:
        if "controlnet_mode_embedder.weight" in shapes:
            raise UserError("it follows images of several kinds (a union net) and has to be told which: not supported")
        if "controlnet_x_embedder.weight" in shapes:
            return diffusers(shapes)
        return NATIVE if "pos_embed_input.weight" in shapes else None

    return Component(
        name="controlnet", title="the ControlNet", folder="controlnet", flag=FLAG, net=net, key_format=known,
        single=lambda shapes: NATIVE if f"{HINT}.0.weight" in shapes else diffusers(shapes), diffusers=diffusers,
    )  # fmt: skip


# --- at work ---


def doors(denoiser: nn.Module, net: nn.Module) -> Sequence[Door]:
    """The residuals onto tokens of the image after each block. There are fewer of them: those of nets that take pixels
    go round, those of others serve as many blocks in a row, as in XLabs' and InstantX' code."""
    base, control = cast(FluxBase, denoiser), cast(ControlTrunk, net)
    if (given := control.img_in.out_features) != (width := base.img_in.out_features):
        raise UserError(f"{FLAG}: its blocks are {given} wide, the model's {width}: it is for another model")
    count, around = len(control.controlnet_blocks), control.input_hint_block is not None
    double = spread(len(base.double_blocks), count, around)
    single = spread(len(base.single_blocks), len(control.controlnet_single_blocks), False)
    return [
        *(Door(module=base.double_blocks[i], residual=j, add=_onto_first) for i, j in enumerate(double)),
        *(Door(module=base.single_blocks[i], residual=count + j, add=_onto_last) for i, j in enumerate(single)),
    ]


def spread(count: int, residuals: int, around: bool) -> list[int]:
    """Which residual each of `count` blocks gets; `around`: one after another and again from the first."""
    if not residuals:
        return []
    each = math.ceil(count / residuals)
    return [i % residuals if around else i // each for i in range(count)]


def _onto_first(output: tuple[Tensor, Tensor], residual: Tensor) -> tuple[Tensor, Tensor]:
    """Of a block of two streams, which gives those of the image and of the text."""
    img, txt = output
    return img + residual, txt


def _onto_last(tokens: Tensor, residual: Tensor) -> Tensor:
    """Of a block of one stream: those of the image come last."""
    text = tokens.shape[1] - residual.shape[1]
    return torch.cat([tokens[:, :text], tokens[:, text:] + residual], 1)


def unused(net: nn.Module) -> str:
    """What becomes of the text in the last block, which is the end of it."""
    control = cast(ControlTrunk, net)
    last = len(control.double_blocks) - 1
    return r"(?!)" if control.single_blocks else rf"double_blocks\.{last}\.txt_(mlp|attn\.(proj|norm\.query_norm))\..*"


def takes_latents(net: nn.Module) -> bool:
    """Whether it follows latents, not pixels."""
    return cast(ControlTrunk, net).input_hint_block is None


CONTROL = ControlSpec(
    component=control_component(control_net),
    shapes=control_shapes,
    zero=zeros,
    doors=doors,
    blocks=blocks,
    unused=unused,
    takes_latents=takes_latents,
    config=lambda shapes: flux_config(FluxControlNet.of(shapes)),
)
