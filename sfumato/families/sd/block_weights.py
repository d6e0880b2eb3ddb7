"""Layer-wise weights (LBW) of an adapter: which of a U-Net's blocks a list of 12, 17, 20 or 26 numbers is for.

As sd-scripts' merging scripts and the web UI's extension lora-block-weight have it.
"""

from __future__ import annotations

from sfumato.formats.dialect import ModulePath
from sfumato.models.base import BlockWeights

_TWELVE = [f"{i:02}" for i in range(12)]
ALL = ("BASE", *(f"IN{i}" for i in _TWELVE), "MID", *(f"OUT{i}" for i in _TWELVE))
"""BASE: the text encoders."""


def block(path: ModulePath) -> str:
    """The block of a layer, by its path in the U-Net's own names; "": it has no weight."""
    component, module = path
    if component != "denoiser":
        return "BASE"
    part, number = [*module.split("."), ""][:2]
    if part == "middle_block":
        return "MID"
    side = {"input_blocks": "IN", "output_blocks": "OUT"}.get(part)
    return f"{side}{int(number):02}" if side else ""


def sdxl_block(path: ModulePath) -> str:
    """The same for SDXL, whose embedders go with the first block, and whose last convolution with a tenth."""
    part = path[1].partition(".")[0]
    first = path[0] == "denoiser" and part in ("time_embed", "label_emb")
    return "IN00" if first else "OUT09" if path == ("denoiser", "out.2") else block(path)


def _without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in ALL if name not in names)


SD = BlockWeights(
    block=block,
    lists={
        17: _without("IN00", "IN03", "IN06", "IN09", "IN10", "IN11", "OUT00", "OUT01", "OUT02"),
        26: ALL,
    },
)
SDXL = BlockWeights(
    block=sdxl_block,
    lists={
        12: ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{i:02}" for i in range(6))),
        20: _without("IN09", "IN10", "IN11", "OUT09", "OUT10", "OUT11"),
    },
)
