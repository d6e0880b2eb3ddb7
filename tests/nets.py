"""Nets for tests, built as users' files are: written to a file of their own, opened as a part, and filled."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.formats.files import save
from sfumato.models.autoencoders import vae_component
from sfumato.models.components import Component, open_component
from sfumato.models.encoders.clip import clip_component
from sfumato.models.encoders.t5 import t5_component

T5 = t5_component(("text_encoders.t5xxl.transformer.",), "text_encoder_3")


def built(part: Component, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Any:
    """The part's net with the tensors of a file that holds nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "model.safetensors", tensors)
        # What is backed by the file stays so when its name is gone.
        return open_component(part, f"{folder}/model.safetensors").build(dtype)


def clip(tensors: Mapping[str, Tensor], activation: str = "quick_gelu", *, projected: bool = False) -> Any:
    """A CLIP text encoder, in any spelling."""
    return built(clip_component("clip", (), "text_encoder", activation, projected=projected), tensors)


def t5(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Any:
    """T5's encoder."""
    return built(T5, tensors, dtype)


def vae(tensors: Mapping[str, Tensor], *scaling: float, channels: int = 4) -> Any:
    """A KL autoencoder, in any spelling. `scaling`: the factor, and the shift if there is one."""
    return built(vae_component(("first_stage_model.", "vae."), *scaling, channels=channels), tensors)
