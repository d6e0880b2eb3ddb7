"""Control nets of Chroma: its first blocks, which take pixels besides, as sd-scripts' nets for FLUX.1 do.

They have no modulations of their own: the model's are made by one small net that never changes, and serve both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.families.chroma.net import DOUBLE, SINGLE, Chroma, cut, no_modulation
from sfumato.families.flux import control as flux
from sfumato.models.components import Component, Config
from sfumato.models.control import FLAG, ControlSpec
from sfumato.models.key_formats import NATIVE, KeyFormat
from sfumato.models.layers import Shapes


class ChromaControlNet(flux.ControlTrunk):
    """What `Chroma` takes, its modulation vectors in place of the time, and hint (b, ...) -> for each block (b, m, c),
    which is added to tokens of the image."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, no_modulation)

    def forward(
        self, x: Tensor, vectors: Sequence[Tensor], context: Tensor, mask: Tensor | None = None, *, hint: Tensor
    ) -> list[Tensor]:
        """As of `Chroma` and `ControlTrunk.residuals`; vectors: of `Chroma.vectors`, of which the first are used."""
        single, img, txt, _ = vectors
        doubles, singles = len(self.double_blocks), len(self.single_blocks)
        double = zip(cut(img, DOUBLE, doubles), cut(txt, DOUBLE, doubles), strict=True)
        return self.residuals(x, context, double, cut(single, SINGLE, singles), mask, hint)


def arguments(denoiser: nn.Module, args: Sequence[Any]) -> Sequence[Any]:
    """What the model is given -> what its control nets are given."""
    x, t, *others = args
    return [x, cast(Chroma, denoiser).vectors(t, x.dtype), *others]


def control_net(shapes: Shapes, config: Config) -> ChromaControlNet:
    """A net without values for tensors of these shapes. Errors: `UserError` for one that takes more than an image."""
    net = ChromaControlNet.of(shapes)
    flux.check_inputs(net)
    return net


def key_format(shapes: Shapes) -> KeyFormat | None:
    """See `Component.key_format`."""
    return NATIVE if "pos_embed_input.weight" in shapes else None


def no_config(shapes: Shapes) -> Config:
    """Errors: `UserError`, as diffusers has no such net."""
    raise UserError("save_model_as: diffusers has no ControlNet of Chroma; leave it out for a single file")


CONTROL: ControlSpec = replace(
    flux.CONTROL,
    component=Component(name="controlnet", title="the ControlNet", flag=FLAG, net=control_net, key_format=key_format),
    arguments=arguments,
    config=no_config,
)
