"""The U-Net of Stable Diffusion XL, in the names of its checkpoints: that of 2.x with a label beside the time.

Architecture: Podell et al. 2023 (arXiv:2307.01952). The numbers of levels and of transformer blocks and the width of
the label are read off the shapes, so that the refiner is such a net as well.
"""

from __future__ import annotations

from torch import Tensor, nn

from sfumato.families.sd.net import UNetBase, blocks
from sfumato.models.layers import MLP, Shapes

__all__ = ["UNet", "blocks"]


class UNet(UNetBase):
    """x (b, 4, h, w), t (b,), context (b, n, d), y (b, m) -> (b, 4, h, w); any h and w.

    y: the pooled text, then the embedded sizes (1280 + 6 * 256 in the base model).
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        # The names have one more number than the layers need.
        self.label_emb = nn.Sequential(MLP(shapes, "label_emb.0"))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
        """The prediction, noise or velocity, for x at time t; shaped as x."""
        return self.forward_blocks(x, self.time(t, x.dtype) + self.label_emb(y), context)
