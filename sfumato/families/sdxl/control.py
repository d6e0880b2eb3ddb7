"""ControlNets of Stable Diffusion XL: those of 1.x and 2.x with a label beside the time."""

from __future__ import annotations

from torch import Tensor, nn

from sfumato.families.sd import control as sd
from sfumato.families.sdxl.folder import check_unet, half_config
from sfumato.families.sdxl.names import unet_keys
from sfumato.models.layers import MLP, Shapes


class ControlNet(sd.ControlBase):
    """Of Stable Diffusion XL."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        # The names have one more number than the layers need.
        self.label_emb = nn.Sequential(MLP(shapes, "label_emb.0"))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor, *, hint: Tensor) -> list[Tensor]:
        """As of `families.sd.control`, with y (b, m) as the U-Net takes it."""
        return self.forward_blocks(x, self.time(t, x.dtype) + self.label_emb(y), context, hint)


CONTROL = sd.spec(ControlNet, unet_keys, check_unet, half_config, ldm=False)
