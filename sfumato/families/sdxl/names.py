"""The names of Stable Diffusion XL's files: prefixes of the single file, a table to diffusers, tensors that belong to
no net."""

from __future__ import annotations

import re
from collections.abc import Collection

from sfumato.families.sd import names as sd
from sfumato.families.sd.names import NO_NETS, UNET_TARGETS, VAE
from sfumato.formats.names import KeyMap, rule

__all__ = ["CLIP_G", "CLIP_L", "PASSTHROUGH", "UNET_TARGETS", "VAE", "unet_keys"]

CLIP_L = "conditioner.embedders.0.transformer."
"""CLIP-L in transformers' names."""
CLIP_G = "conditioner.embedders.1.model."
"""OpenCLIP-bigG in its own names; its `text_projection` is of the net."""

PASSTHROUGH = re.compile(
    NO_NETS
    # Only the states of CLIP-L are used, so its projection is of no net; some programs write the scales without a
    # prefix.
    + r"|conditioner\.embedders\.0\.(transformer\.)?"
    + r"(text_model\.embeddings\.position_ids|logit_scale|text_projection(\.weight)?)"
    r"|conditioner\.embedders\.1\.(model\.)?(logit_scale|attn_mask|transformer\.text_model\.embeddings\.position_ids)"
)
"""Full names of tensors that no net holds; they are copied from the source file on save."""


def unet_keys(names: Collection[str]) -> KeyMap:
    """native: the single file. foreign: diffusers' UNet2DConditionModel. For a net with tensors of these names, of
    either side."""
    label = [rule(f"label_emb.0.{i}", f"add_embedding.linear_{j}") for i, j in ((0, 1), (2, 2))]
    return KeyMap(*sd.unet_keys(names).rules, *label)
