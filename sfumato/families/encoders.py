"""CLIP's text models: transformers' classes under the names that files use.

transformers renames the parts of its classes between releases; here a module's path is what stands in
the file (`text_model.encoder.layers.0.mlp.fc1`), and adapters are named by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.families.fill import fill
from sfumato.formats.names import KeyMap, rule

HEAD_WIDTH = 64
"""Channels of an attention head in every published CLIP text model."""

_PARTS = ("embeddings", "encoder", "final_layer_norm")

CLIP_HF = KeyMap(rule("text_model"))
"""native: a `ClipText`. foreign: transformers' names with `text_model.`, as in single files and most folders."""
CLIP_BARE = KeyMap(*(rule(f"text_model.{part}", part) for part in _PARTS))
"""native: a `ClipText`. foreign: the same without `text_model.`, as in early single files."""

_LAYER, _BLOCK = "text_model.encoder.layers.{i}", "transformer.resblocks.{i}"
_QKV = ("q_proj", "k_proj", "v_proj")
OPEN_CLIP = KeyMap(
    rule("token_embedding", "text_model.embeddings.token_embedding"),
    rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    rule("ln_final", "text_model.final_layer_norm"),
    rule(f"{_BLOCK}.ln_1", f"{_LAYER}.layer_norm1"),
    rule(f"{_BLOCK}.ln_2", f"{_LAYER}.layer_norm2"),
    rule(f"{_BLOCK}.mlp.c_fc", f"{_LAYER}.mlp.fc1"),
    rule(f"{_BLOCK}.mlp.c_proj", f"{_LAYER}.mlp.fc2"),
    rule(f"{_BLOCK}.attn.out_proj", f"{_LAYER}.self_attn.out_proj"),
    rule(f"{_BLOCK}.attn.in_proj_weight", *(f"{_LAYER}.self_attn.{p}.weight" for p in _QKV)),
    rule(f"{_BLOCK}.attn.in_proj_bias", *(f"{_LAYER}.self_attn.{p}.bias" for p in _QKV)),
)
"""native: OpenCLIP's names, with q, k and v in one tensor. foreign: a `ClipText`, which has them apart."""


class ClipText(nn.Module):
    """Token ids (b, n) -> hidden states (b, n, d)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import CLIPTextModel

        self.config = config
        model = CLIPTextModel(config)
        self.text_model = getattr(model, "text_model", model)

    def forward(self, ids: Tensor, skip: int = 1) -> Tensor:
        """States after the `skip`-th layer from the end (1: the last), through the final norm; the mask is causal."""
        states = self.text_model(input_ids=ids, output_hidden_states=True).hidden_states[-skip]
        normed: Tensor = self.text_model.final_layer_norm(states)
        return normed

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer's layers, in forward order."""
        layers: nn.ModuleList = self.text_model.encoder.layers
        return layers


def clip_text(tensors: Mapping[str, Tensor], activation: str, what: str = "the text encoder") -> ClipText:
    """A text model with these tensors (names with `text_model.`); sizes are read off their shapes.

    activation: "quick_gelu" (OpenAI's CLIP) or "gelu" (OpenCLIP). Errors: `UserError` for missing or further tensors.
    """
    from transformers import CLIPTextConfig

    try:
        vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=count_layers(tensors, r"text_model\.encoder\.layers\.(\d+)\."),
            num_attention_heads=heads(width),
            max_position_embeddings=tensors["text_model.embeddings.position_embedding.weight"].shape[0],
            hidden_act=activation,
            projection_dim=width,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
    except KeyError as missing:
        raise UserError(f"{what} lacks the tensor {missing}: the file is incomplete or of another kind") from None
    with torch.device("meta"):
        net = ClipText(config)
    fill(net, tensors, what)
    positions = net.text_model.embeddings.position_embedding.num_embeddings
    # Not in any file: transformers counts the positions in a buffer, which came without values.
    net.text_model.embeddings.position_ids = torch.arange(positions)[None]
    return net


def heads(width: int) -> int:
    """Attention heads of a text model of this width."""
    return max(1, width // HEAD_WIDTH)


def count_layers(names: Mapping[str, Any], pattern: str) -> int:
    """How many different numbers the group of `pattern` finds at the start of the names."""
    return len({m[1] for name in names if (m := re.match(pattern, name))})
