"""CLIP's text models: transformers' classes under the names that files use.

transformers renames the parts of its classes between releases; here a module's path is what stands in
the file (`text_model.encoder.layers.0.mlp.fc1`), and adapters are named by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.formats.names import TRANSPOSE, KeyMap, rule

HEAD_WIDTH = 64
"""Channels of an attention head in every published CLIP text model."""
VOCABULARY = 49408
"""CLIP's tokens; the last marks the end of a caption. Embeddings that users train may follow it."""

LAYERS = r"text_model\.encoder\.layers\.(\d+)\."
"""Pattern of the tensors of a layer, the number of which is its group."""

_PARTS = ("embeddings", "encoder", "final_layer_norm")

CLIP_BARE = KeyMap(*(rule(f"text_model.{part}", part) for part in _PARTS), rule("text_projection"))
"""native: a `ClipText`, named as in single files and most folders. foreign: the same without `text_model.`, as in early
single files."""

_LAYER, _BLOCK = "text_model.encoder.layers.{i}", "transformer.resblocks.{i}"
_QKV = ("q_proj", "k_proj", "v_proj")
OPEN_CLIP = KeyMap(
    rule("token_embedding", "text_model.embeddings.token_embedding"),
    rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    rule("ln_final", "text_model.final_layer_norm"),
    rule("text_projection", "text_projection.weight", change=TRANSPOSE),
    rule(f"{_BLOCK}.ln_1", f"{_LAYER}.layer_norm1"),
    rule(f"{_BLOCK}.ln_2", f"{_LAYER}.layer_norm2"),
    rule(f"{_BLOCK}.mlp.c_fc", f"{_LAYER}.mlp.fc1"),
    rule(f"{_BLOCK}.mlp.c_proj", f"{_LAYER}.mlp.fc2"),
    rule(f"{_BLOCK}.attn.out_proj", f"{_LAYER}.self_attn.out_proj"),
    rule(f"{_BLOCK}.attn.in_proj_weight", *(f"{_LAYER}.self_attn.{p}.weight" for p in _QKV)),
    rule(f"{_BLOCK}.attn.in_proj_bias", *(f"{_LAYER}.self_attn.{p}.bias" for p in _QKV)),
)
"""native: OpenCLIP's names, with q, k and v in one tensor and the projection as x @ p. foreign: a `ClipText`."""


class ClipSays(NamedTuple):
    """What a text model says of b captions of n tokens."""

    states: Tensor
    """(b, n, d) after the layer asked for."""
    normed: Tensor
    """(b, n, d) `states` through the final norm."""
    pooled: Tensor
    """(b, d) after the last layer and the final norm, at the first end mark."""
    projected: Tensor
    """(b, p) `pooled` through the text projection; `pooled` itself where there is none."""


class ClipText(nn.Module):
    """Token ids (b, n) -> `ClipSays`."""

    def __init__(self, config: Any, *, projected: bool = False) -> None:
        super().__init__()
        from transformers import CLIPTextModel

        self.config = config
        model = CLIPTextModel(config)
        self.text_model = getattr(model, "text_model", model)
        # A count of the positions, which no file holds: it is made in `forward`, where it cannot be without values.
        del self.text_model.embeddings.position_ids
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if projected else nn.Identity()
        )

    def forward(self, ids: Tensor, skip: int = 1) -> ClipSays:
        """States after the `skip`-th layer from the end (1: the last), and what is pooled of the last; the mask is
        causal."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        said = self.text_model(input_ids=ids, position_ids=positions, output_hidden_states=True)
        states = said.hidden_states[-skip]
        return ClipSays(
            states,
            self.text_model.final_layer_norm(states),
            said.pooler_output,
            self.text_projection(said.pooler_output),
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer's layers, in forward order."""
        layers: nn.ModuleList = self.text_model.encoder.layers
        return layers


def clip_net(shapes: Mapping[str, tuple[int, ...]], activation: str) -> ClipText:
    """A text model without values (on the meta device) for tensors of these names (with `text_model.`) and shapes.

    activation: "quick_gelu" (OpenAI's CLIP) or "gelu" (OpenCLIP). Errors: `KeyError` for a missing tensor.
    """
    from transformers import CLIPTextConfig

    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight")
    end = min(vocabulary, VOCABULARY) - 1
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=count_layers(shapes, LAYERS),
        num_attention_heads=heads(width),
        max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
        hidden_act=activation,
        projection_dim=projection[0] if projection else width,
        bos_token_id=end - 1,
        eos_token_id=end,
    )
    with torch.device("meta"):
        return ClipText(config, projected=projection is not None)


def heads(width: int) -> int:
    """Attention heads of a text model of this width."""
    return max(1, width // HEAD_WIDTH)


def count_layers(names: Mapping[str, Any], pattern: str) -> int:
    """How many different numbers the group of `pattern` finds at the start of the names."""
    return len({m[1] for name in names if (m := re.match(pattern, name))})
