"""Options that families with several text encoders have in common, with their rules; imports no torch."""

from __future__ import annotations

from typing import Annotated

from sfumato.config.rules import Amount, Excludes, Needs, Only

TextEncoderRate = Annotated[
    Amount | None,
    Only("full", why="an adapter's text encoders go by text_encoder_lr and network_train_unet_only"),
    Needs("train_text_encoder"),
]
"""Learning rate of one text encoder when whole models are trained."""
T5Rate = Annotated[TextEncoderRate, Needs("train_t5xxl", why="it needs train_t5xxl as well")]
TrainT5 = Annotated[
    bool,
    Needs("train_text_encoder", method="full"),
    Excludes(
        *("network_train_unet_only", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
        method="network",
        why="network_train_unet_only and cache_text_encoder_outputs leave the text encoders alone",
    ),
]
OWN_RATES = "every text encoder that is trained has a rate of its own"
