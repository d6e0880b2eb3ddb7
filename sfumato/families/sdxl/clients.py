"""Who loads adapters of Stable Diffusion XL, and by which names; imports no torch."""

from __future__ import annotations

from sfumato.families.sd.clients import UNET
from sfumato.models.shared_names import ALL, clip_names

LOADS_IN = (
    *UNET,
    *clip_names("clip_l", "1", "text_encoder", ALL),
    *clip_names("clip_g", "2", "text_encoder_2", ALL),
)
